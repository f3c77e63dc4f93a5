// Threads that help a caller; see pool.cpp.
#pragma once

namespace qgraph {

class Pool;

// The pool's threads, lent to one caller: others work alone meanwhile.
class Helpers {
 public:
  explicit Helpers(int threads);  // the caller is one of them
  ~Helpers();
  Helpers(const Helpers&) = delete;

  // Calls `task(data, thread, number)` for the first `count` numbers in any order, here as thread 0
  // and on whatever threads come; returns when all are done.
  void each(void (*task)(void*, int thread, long number), void* data, long count);

 private:
  Pool* pool_;
};

// How many cores this process may use.
int cores();

}  // namespace qgraph
