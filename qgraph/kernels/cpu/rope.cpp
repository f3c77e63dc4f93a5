// Rotary positions: pairs of elements turned by an angle that grows with the position.

#include <cmath>
#include <vector>

#include "functions.hpp"
#include "walks.hpp"

namespace qgraph {
namespace {

class Rope : public Work {
 public:
  Rope(const Table& table, const qg_rope& args) : a(args), half_(args.dims / 2) {
    if (a.dims < 0 || a.dims > a.dim || a.dims % 2)
      throw Mistake("it turns %ld of %ld elements", (long)a.dims, (long)a.dim);
    int64_t shape[] = {a.batch, a.heads, a.length, a.dim};
    for (const auto* ref : {&a.x, &a.y}) {
      table.is_float("x or y", *ref);
      table.holds("x or y", *ref, 4, shape, ref == &a.x ? a.x_strides : a.y_strides);
    }
    if (given(a.freqs)) {
      table.one_of("freqs", a.freqs, a.freqs.dtype == QG_F32, "float32");
      table.holds("freqs", a.freqs, half_);
    } else {
      for (long i = 0; i < half_; i++) steps_.push_back(std::pow(a.base, -2.0 * i / a.dims));
    }
    if (given(a.offset)) {
      table.is_integer("offset", a.offset);
      int64_t batch[] = {a.batch};
      table.holds("offset", a.offset, 1, batch, &a.offset_batch);
    }
  }

  long tasks(int, int threads) const override {
    long rows = a.batch * a.length;
    return rows && a.heads ? over(rows, part(threads)) : 0;
  }

  long own_bytes() const override {
    return (2 * up(half_, 16) + up(a.dim, 16)) * (long)sizeof(float);
  }

  void run(const Here& here, int, long task) const override {
    long begin = task * part(here.threads), end = begin + part(here.threads);
    for (long i = begin; i < end && i < a.batch * a.length; i++)
      position(here, i / a.length, i % a.length);
  }

 private:
  long part(int threads) const {
    return part_of(a.batch * a.length, 10000 / (a.heads * a.dim + 1) + 1, threads);
  }

  void position(const Here& here, long batch, long at) const {
    float *cosine = (float*)here.own, *sine = cosine + up(half_, 16), *x = sine + up(half_, 16);
    int64_t first = a.start;
    if (given(a.offset))
      first += integer_at(a.offset.dtype,
                          here(a.offset) + batch * a.offset_batch * size_of(a.offset.dtype));
    double angle = (double)(first + at) * a.scale;
    const float* freqs = here.at<const float>(a.freqs);
    for (long i = 0; i < half_; i += kLanes) {
      Floats angles{};
      for (long j = 0; j < kLanes && i + j < half_; j++)
        angles[j] = (float)(freqs ? angle / freqs[i + j] : angle * steps_[i + j]);
      Floats s, c;
      sine_cosine(angles, &s, &c);
      store(cosine + i, c);
      store(sine + i, s);
    }
    for (long head = 0; head < a.heads; head++) {
      long from = batch * a.x_strides[0] + head * a.x_strides[1] + at * a.x_strides[2];
      long to = batch * a.y_strides[0] + head * a.y_strides[1] + at * a.y_strides[2];
      widen(a.x.dtype, here(a.x) + from * size_of(a.x.dtype), a.x_strides[3], x, a.dim);
      turn(x, cosine, sine);
      narrow(a.y.dtype, x, here(a.y) + to * size_of(a.y.dtype), a.y_strides[3], a.dim);
    }
  }

  void turn(float* x, const float* cosine, const float* sine) const {
    long step = a.traditional ? 2 : 1, other = a.traditional ? 1 : half_;
    for (long i = 0; i < half_; i++) {
      float left = x[i * step], right = x[i * step + other];
      x[i * step] = left * cosine[i] - right * sine[i];
      x[i * step + other] = left * sine[i] + right * cosine[i];
    }
  }

  const qg_rope a;
  long half_;
  std::vector<double> steps_;  // angle from one position to the next
};

}  // namespace

Maker make_rope(const Table& table, long args) {
  return Maker(new Rope(table, *table.args<qg_rope>(args)));
}

}  // namespace qgraph
