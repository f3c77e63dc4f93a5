// Chains of elementwise operations: a byte code over blocks of lanes.
//
// The elements are counted in row-major order; a task takes some blocks of them.  For each block
// inputs are read into registers, instructions run one after another, outputs are written.  float32
// that lies side by side is not moved: the registers of such inputs and outputs are in memory.
// Where an operand lies across the others, blocks are squares of both axes, so that each line of
// memory is fetched once.

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "blocks.hpp"
#include "elements.hpp"
#include "lane_ops.hpp"
#include "work.hpp"

namespace qgraph {
namespace {

struct Value {
  int dtype = 0;
  int place = 0;  // its register
};

struct Instruction {
  int op, dtype, a, b, c, to;
  double real;
  int64_t integer;
  LaneOp function;
};

bool gives_bool(int op) {
  return (op >= QG_OP_EQUAL && op <= QG_OP_LOGICAL_NOT) ||
         (op >= QG_OP_ISNAN && op <= QG_OP_ISNEGINF);
}

bool reads_two(int op) {
  return (op >= QG_OP_ADD && op <= QG_OP_LOGICAL_OR) ||
         (op >= QG_OP_BITWISE_AND && op <= QG_OP_BITWISE_XOR) || op == QG_OP_LEFT_SHIFT ||
         op == QG_OP_RIGHT_SHIFT;
}

// Brings int64 lanes into the range of a dtype, by dropping bits.
void wrap(int dtype, int64_t* x, long count) {
  auto each = [&](auto narrow) {
    for (long i = 0; i < count; i++) x[i] = (decltype(narrow))x[i];
  };
  switch (dtype) {
    case QG_BOOL: for (long i = 0; i < count; i++) x[i] = x[i] != 0; break;
    case QG_U8: each(uint8_t{}); break;
    case QG_I8: each(int8_t{}); break;
    case QG_U16: each(uint16_t{}); break;
    case QG_I16: each(int16_t{}); break;
    case QG_U32: each(uint32_t{}); break;
    case QG_I32: each(int32_t{}); break;
  }
}

void round_lanes(int dtype, float* x, long count) {
  if (dtype == QG_F32) return;
  of_float(dtype, [&](auto d) {
    using D = decltype(d);
    for (long i = 0; i < count; i += kLanes) {
      typename D::Stored half[kLanes];
      D::store(half, load<Floats>(x + i));
      store(x + i, D::load(half));
    }
  });
}

void read(int dtype, const char* from, long step, void* to, long count) {
  if (is_float(dtype)) {
    if (step != 0) return widen(dtype, from, step, (float*)to, count);
    float x;
    widen(dtype, from, 1, &x, 1);
    for (long i = 0; i < count; i++) ((float*)to)[i] = x;
    return;
  }
  read_integers(dtype, from, step, (int64_t*)to, count);
}

void write(int dtype, const void* from, char* to, long step, long count) {
  if (is_float(dtype)) return narrow(dtype, (const float*)from, to, step, count);
  write_integers(dtype, (const int64_t*)from, to, step, count);
}

using Longs = int64_t __attribute__((vector_size(8 * kLanes)));

// Cut to a whole number; NaN is 0, and what is too large the last number that there is.
int64_t whole(float x) {
  return x != x ? 0 : x >= 0x1p63f ? INT64_MAX : x < -0x1p63f ? INT64_MIN : (int64_t)x;
}

class Elementwise : public Work {
  static constexpr long kRegister = kBlock * (long)sizeof(int64_t) + 192;  // never 4096 bytes apart:
  // a load would wait for the store to the same place of another register

 public:
  Elementwise(const Table& table, const qg_elementwise& a) {
    if (a.rank < 0 || a.rank > QG_RANK) throw Mistake("it has %ld axes", (long)a.rank);
    for (long i = 0; i < a.rank; i++) count_ *= a.shape[i] < 0 ? 0 : a.shape[i];
    const auto* inputs = table.args<qg_operand>(a.input_at, a.inputs);
    const auto* outputs = table.args<qg_output>(a.output_at, a.outputs);
    const auto* given = table.args<qg_instruction>(a.instruction_at, a.instructions);
    inputs_ = a.inputs;
    for (long i = 0; i < a.inputs; i++) {
      table.holds("an input", inputs[i].at, a.rank, a.shape, inputs[i].strides);
      operands_.push_back(inputs[i]);
      values_.push_back({inputs[i].at.dtype});
    }
    for (long i = 0; i < a.instructions; i++) add(given[i]);
    for (long i = 0; i < a.outputs; i++) {
      const qg_output& o = outputs[i];
      table.holds("an output", o.to.at, a.rank, a.shape, o.to.strides);
      if (value(o.value).dtype != o.to.at.dtype)
        throw Mistake("output %ld has dtype %d, its value %d", i, o.to.at.dtype,
                      value(o.value).dtype);
      operands_.push_back(o.to);
      written_.push_back(o.value);
    }
    find_axes(a);
    shape_.reset(new Shape(a, &operands_));
    give_registers();
    find_direct();
  }

  long tasks(int, int threads) const override {
    return count_ ? over(shape_->blocks(), part(threads)) : 0;
  }

  long own_bytes() const override {
    return registers_ * kRegister + (long)(values_.size() * sizeof(void*));
  }

  bool prepares(int) const override { return true; }

  // Where values lie, and the constants.
  void prepare(const Here& here, int) const override {
    void** places = places_of(here);
    for (long v = 0; v < (long)values_.size(); v++)
      places[v] = here.own + values_[v].place * kRegister;
    for (const Instruction& i : code_) {
      if (i.op != QG_OP_CONST) continue;
      if (is_float(i.dtype)) {
        std::fill_n((float*)places[i.to], kBlock, (float)i.real);
        round_lanes(i.dtype, (float*)places[i.to], kBlock);
      } else {
        std::fill_n((int64_t*)places[i.to], kBlock, i.integer);
        wrap(i.dtype, (int64_t*)places[i.to], kBlock);
      }
    }
  }

  void run(const Here& here, int, long task) const override {
    long begin = task * part(here.threads), end = begin + part(here.threads);
    for (long i = begin; i < end && i < shape_->blocks(); i++) block(here, i);
  }

 private:
  const Value& value(long number) const {
    if (number < 0 || number >= (long)values_.size()) throw Mistake("value %ld is none", number);
    return values_[number];
  }

  void add(const qg_instruction& given) {
    Instruction i{given.op, given.dtype, given.a, given.b, given.c, (int)values_.size(),
                  given.value.real, given.value.integer, nullptr};
    if (i.dtype < QG_BOOL || i.dtype > QG_F32) throw Mistake("an instruction of dtype %d", i.dtype);
    int result = gives_bool(i.op) ? QG_BOOL : i.dtype;
    if (i.op == QG_OP_CONST || i.op == QG_OP_IOTA) {
      i.a = i.b = i.c = -1;
    } else if (i.op == QG_OP_CAST || i.op == QG_OP_BITCAST) {
      value(i.a);
      i.b = i.c = -1;
      if (i.op == QG_OP_BITCAST && size_of(value(i.a).dtype) != size_of(i.dtype))
        throw Mistake("bits of %ld bytes are none of %ld", size_of(value(i.a).dtype),
                      size_of(i.dtype));
    } else {
      i.function = is_float(i.dtype) ? float_op(i.op) : integer_op(i.op, i.dtype);
      if (!i.function && i.op != QG_OP_WHERE)
        throw Mistake("operation %d does not take dtype %d", i.op, i.dtype);
      bool three = i.op == QG_OP_FMA || i.op == QG_OP_WHERE;
      if (!three) i.c = -1;
      if (!three && !reads_two(i.op)) i.b = -1;
      int operands[] = {i.a, i.b, i.c};
      for (int n = 0; n < 3; n++) {
        if (operands[n] == -1 && n > 0 && (n == 2 ? !three : i.b == -1)) continue;
        int wanted = i.op == QG_OP_WHERE && n == 0 ? QG_BOOL : i.dtype;
        if (value(operands[n]).dtype != wanted)
          throw Mistake("operation %d on dtype %d is given dtype %d", i.op, wanted,
                        value(operands[n]).dtype);
      }
    }
    values_.push_back({result});
    code_.push_back(i);
  }

  // An instruction that counts along an axis is an input with a stride, of no buffer.
  void find_axes(const qg_elementwise& a) {
    for (auto& i : code_) {
      if (i.op != QG_OP_IOTA) continue;
      if (i.integer < 0 || i.integer >= a.rank) throw Mistake("axis %ld is none", (long)i.integer);
      qg_operand counted{{-1, QG_I64, 0}, {}};
      counted.strides[i.integer] = 1;
      i.integer = operands_.size();
      operands_.push_back(counted);
    }
  }

  // A register is free again after the last instruction that reads its value.
  void give_registers() {
    std::vector<long> last(values_.size(), -1);
    for (long n = 0; n < (long)code_.size(); n++)
      for (int v : {code_[n].a, code_[n].b, code_[n].c})
        if (v >= 0) last[v] = n;
    for (long v : written_) last[v] = code_.size();
    for (const Instruction& i : code_)
      if (i.op == QG_OP_CONST) last[i.to] = code_.size();  // written once, before the first block
    std::vector<int> free;
    auto take = [&](Value& v) {
      if (free.empty()) free.push_back(registers_++);
      v.place = free.back();
      free.pop_back();
    };
    for (long v = 0; v < inputs_; v++) take(values_[v]);
    for (const Instruction& i : code_)
      if (i.op == QG_OP_CONST) take(values_[i.to]);
    for (long n = 0; n < (long)code_.size(); n++) {
      if (code_[n].op == QG_OP_CONST) continue;
      take(values_[code_[n].to]);  // before others are free: no instruction writes what it reads
      int read[] = {code_[n].a, code_[n].b, code_[n].c, code_[n].to};
      for (int k = 0; k < 4; k++) {
        bool before = false;
        for (int j = 0; j < k; j++) before = before || read[j] == read[k];
        if (read[k] >= 0 && last[read[k]] <= n && !before) free.push_back(values_[read[k]].place);
      }
    }
  }

  // Operands of float32 that may be worked on where they lie.
  void find_direct() {
    auto fits = [&](const qg_operand& o) { return o.at.dtype == QG_F32 && inner(o) == 1; };
    for (long v = 0; v < inputs_; v++) direct_.push_back(fits(operands_[v]));
    for (long n = 0; n < (long)written_.size(); n++) {
      const qg_operand& to = operands_[inputs_ + n];
      bool alone = written_[n] >= inputs_ && code_[written_[n] - inputs_].op != QG_OP_CONST;
      for (long m = 0; m < (long)written_.size(); m++) alone = alone && (m == n || written_[m] != written_[n]);
      for (long v = 0; v < inputs_; v++)  // which would be written before it is read
        alone = alone && operands_[v].at.buffer != to.at.buffer;
      direct_.push_back(alone && fits(to));
    }
  }

  long part(int threads) const {
    long cost = code_.size() + operands_.size();
    return part_of(shape_->blocks(), over(40000 / cost + 1, kBlock), threads);
  }

  void** places_of(const Here& here) const { return (void**)(here.own + registers_ * kRegister); }

  void block(const Here& here, long block) const {
    void** places = places_of(here);
    auto place = [&](long v) -> void* { return v < 0 ? nullptr : places[v]; };
    bool run = shape_->is_run(block);
    for (long n = 0; n < inputs_ + (long)written_.size(); n++) {
      if (!direct_[n]) continue;
      long v = n < inputs_ ? n : written_[n - inputs_];
      places[v] = here.own + values_[v].place * kRegister;
      if (run) shape_->runs(block, [&](long, long, const long* index) {
        places[v] = at_index(here, operands_[n], index);
      });
    }
    for (long v = 0; v < inputs_; v++) {
      const qg_operand& operand = operands_[v];
      long wide = is_float(operand.at.dtype) ? 4 : 8;
      if (run && direct_[v]) continue;
      if (shape_->crosses(operand)) {
        read_columns(here, operand, block, (char*)place(v));
        continue;
      }
      shape_->runs(block, [&](long at, long some, const long* index) {
        read(operand.at.dtype, at_index(here, operand, index), inner(operand),
             (char*)place(v) + at * wide, some);
      });
    }
    long count = shape_->count_of(block);
    for (const Instruction& i : code_)
      if (i.op != QG_OP_CONST)
        execute(i, block, {place(i.to), place(i.a), place(i.b), place(i.c), count, i.dtype});
    for (long n = 0; n < (long)written_.size(); n++) {
      const qg_operand& operand = operands_[inputs_ + n];
      long wide = is_float(operand.at.dtype) ? 4 : 8;
      if (run && direct_[inputs_ + n]) continue;
      shape_->runs(block, [&](long at, long some, const long* index) {
        write(operand.at.dtype, (char*)place(written_[n]) + at * wide,
              at_index(here, operand, index), inner(operand), some);
      });
    }
  }

  // Line by line as they lie, and turned in the register: along the last axis each line would be
  // fetched again for each of its elements, where lines lie a power of two apart even from far.
  void read_columns(const Here& here, const qg_operand& operand, long block, char* to) const {
    bool real = is_float(operand.at.dtype);
    long along = operand.strides[shape_->across()];
    shape_->columns(block, [&](long at, long step, long some, const long* index) {
      int64_t line[kBlock];
      const char* from = at_index(here, operand, index);
      __builtin_prefetch(from + step * inner(operand) * size_of(operand.at.dtype));  // the next tile's
      read(operand.at.dtype, from, along, line, some);
      for (long i = 0; i < some; i++)
        if (real) ((float*)to)[at + i * step] = ((float*)line)[i];
        else ((int64_t*)to)[at + i * step] = line[i];
    });
  }

  long inner(const qg_operand& operand) const {
    return shape_->rank() ? operand.strides[shape_->rank() - 1] : 0;
  }

  long offset(const qg_operand& operand, const long* index) const {
    long at = 0;
    for (long i = 0; i < shape_->rank(); i++) at += index[i] * operand.strides[i];
    return at;
  }

  char* at_index(const Here& here, const qg_operand& operand, const long* index) const {
    return here(operand.at) + offset(operand, index) * size_of(operand.at.dtype);
  }

  void execute(const Instruction& i, long block, const Lanes& l) const {
    float* reals = (float*)l.to;
    int64_t* integers = (int64_t*)l.to;
    bool to_float = is_float(i.dtype);
    switch (i.op) {
      case QG_OP_IOTA: {
        const qg_operand& counted = operands_[i.integer];
        shape_->runs(block, [&](long at, long some, const long* index) {
          long first = offset(counted, index), step = inner(counted);
          for (long n = 0; n < some; n++)
            to_float ? (void)(reals[at + n] = (float)(first + n * step))
                     : (void)(integers[at + n] = first + n * step);
        });
        break;
      }
      case QG_OP_CAST: cast(values_[i.a].dtype, i.dtype, l); break;
      case QG_OP_BITCAST: recast(values_[i.a].dtype, i.dtype, l); break;
      case QG_OP_WHERE: where(i.dtype, l); return;
      default: i.function(l);
    }
    if (gives_bool(i.op)) return;
    if (to_float) round_lanes(i.dtype, reals, l.count);
    else wrap(i.dtype, integers, l.count);
  }

  // In vectors: a branch for each lane would be guessed wrong.
  static void where(int dtype, const Lanes& l) {
    for (long n = 0; n < l.count; n += kLanes) {
      Longs test = load<Longs>((const int64_t*)l.a + n);
      if (is_float(dtype)) {
        Floats b = load<Floats>((const float*)l.b + n), c = load<Floats>((const float*)l.c + n);
        store((float*)l.to + n, __builtin_convertvector(test, Ints) != 0 ? b : c);
      } else {
        Longs b = load<Longs>((const int64_t*)l.b + n), c = load<Longs>((const int64_t*)l.c + n);
        Longs chosen = test != 0 ? b : c;
        std::memcpy((int64_t*)l.to + n, &chosen, sizeof(chosen));
      }
    }
  }

  static void cast(int from, int to, const Lanes& l) {
    const float* reals = (const float*)l.a;
    const int64_t* integers = (const int64_t*)l.a;
    if (is_float(from) && is_float(to)) {
      std::memcpy(l.to, l.a, l.count * sizeof(float));
    } else if (is_float(from)) {
      for (long n = 0; n < l.count; n++)
        ((int64_t*)l.to)[n] = to == QG_BOOL ? reals[n] != 0 : whole(reals[n]);
    } else if (is_float(to)) {
      for (long n = 0; n < l.count; n++)
        ((float*)l.to)[n] = from == QG_U64 ? (float)(uint64_t)integers[n] : (float)integers[n];
    } else {
      std::memcpy(l.to, l.a, l.count * sizeof(int64_t));
    }
  }

  // Through memory, as the dtypes lie there.
  static void recast(int from, int to, const Lanes& l) {
    char bits[kBlock * sizeof(int64_t)];
    write(from, l.a, bits, 1, l.count);
    read(to, bits, 1, l.to, l.count);
  }

  long count_ = 1, inputs_ = 0, registers_ = 0;
  std::vector<Value> values_;
  std::vector<Instruction> code_;
  std::vector<qg_operand> operands_;  // inputs, outputs, axes counted along
  std::vector<long> written_;
  std::vector<bool> direct_;  // of inputs, then of outputs
  std::unique_ptr<Shape> shape_;
};

}  // namespace

Maker make_elementwise(const Table& table, long args) {
  return Maker(new Elementwise(table, *table.args<qg_elementwise>(args)));
}

}  // namespace qgraph
