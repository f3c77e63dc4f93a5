// Threads that help a caller; see pool.cpp.
#pragma once

namespace qgraph {

// Calls `lead(data)` here, and `help(data, number)` on up to `threads - 1` threads of the pool,
// numbered from 1; returns when `lead` has, and every `help` that began.  A thread may come late,
// or never: `lead` must not wait for one that has not announced itself.
void together(void (*lead)(void*), void (*help)(void*, int number), void* data, int threads);

// Runs `count` tasks in any order.
void for_each(void (*task)(void*, long), void* data, long count, int threads);

// How many cores this process may use.
int cores();

void pause();

}  // namespace qgraph
