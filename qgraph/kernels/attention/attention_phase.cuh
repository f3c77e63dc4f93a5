// Attention as a phase of a region: tasks of `cached_attention` shared out among the blocks of a grid.
// Where several have parts of the same keys' result, whoever is the last of them joins these.

namespace qgraph {

// The parts of a task's rows become their results; by all of a block, once all parts are written.
template <class F>
__device__ void join_parts(const Call<typename F::S>& call, const Place& place, Shared<F>& shared) {
  float* weights = &shared.exchange[0][0][0];  // of each row and split: maximum, then weight; sum
  static_assert(sizeof(shared.exchange) >= sizeof(float) * 2 * F::ROWS * 132);
  for (int i = threadIdx.x; i < F::ROWS * call.splits * 2; i += F::THREADS) {
    const int row = row_of(call, place, i / 2 / call.splits);
    if (row < 0) continue;
    const size_t part = size_t(row) * call.splits + i / 2 % call.splits;
    weights[i] = phases::load_shared(call.parts + part * (F::DV + 2) + F::DV + i % 2);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < F::ROWS * F::DV; i += F::THREADS) {
    const int row = row_of(call, place, i / F::DV);
    if (row < 0) continue;
    const float* own = weights + i / F::DV * call.splits * 2;
    const float* parts = call.parts + size_t(row) * call.splits * (F::DV + 2) + i % F::DV;
    float result = 0, peak = -INFINITY, sum = 0;
    for (int s = 0; s < call.splits; s++) peak = fmaxf(peak, own[2 * s]);
#pragma unroll 8
    for (int s = 0; s < call.splits; s++) {
      const float weight = peak == -INFINITY ? 0 : exp2f(own[2 * s] - peak);
      sum += weight * own[2 * s + 1];
      result += weight * phases::load_shared(parts + s * (F::DV + 2));
    }
    const float shrink = with_sink(call, row, peak, sum);
    call.y[size_t(row) * F::DV + i % F::DV] = typename F::S(result * shrink / sum);
  }
}

// All of the phase; `counters`, one of each SPLITS tasks, are 0 before and after.
template <class F, int TASKS, int SPLITS>
__device__ void attention_phase(const Call<typename F::S>& call, const Token<typename F::S>& token,
                                unsigned* counters, Shared<F>& shared) {
  for (int task = blockIdx.x; task < TASKS; task += gridDim.x) {
    cached_attention<F>(call, token, task, shared);
    __syncthreads();
    if constexpr (SPLITS > 1) {
      unsigned* counter = counters + task / SPLITS;
      if (threadIdx.x == 0) shared.at[0] = phases::add_released(counter, 1) == SPLITS - 1;
      __syncthreads();
      if (shared.at[0]) {
        if (threadIdx.x == 0) *counter = 0;
        join_parts<F>(call, place_of<F>(call, task), shared);
      }
      __syncthreads();
    }
  }
}

}  // namespace qgraph
