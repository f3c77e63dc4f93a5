// Panels of a weight: decoded, or of a dense one turned, so that columns of y lie in lanes.

#include <utility>

#include "panels.hpp"

namespace qgraph {
namespace {

// Swaps rows and columns of a square of registers, blocks of it first.
template <int step = kLanes / 2, typename V>
inline void transpose(V (&square)[kLanes]) {
  constexpr Ints low = lanes_of([](int i) { return i & step ? i - step + kLanes : i; });
  constexpr Ints high = lanes_of([](int i) { return i & step ? i + kLanes : i + step; });
  QG_UNROLLED
  for (int i = 0; i < kLanes; i++) {
    if (i & step) continue;
    V a = square[i], b = square[i + step];
    square[i] = __builtin_shuffle(a, b, low);
    square[i + step] = __builtin_shuffle(a, b, high);
  }
  if constexpr (step > 1) transpose<step / 2>(square);
}

// Each lane has a row of the weight: it decodes kLanes rows at once, unit by unit.
template <typename Code>
class Decoder {
  using U = Units<Code>;

 public:
  Decoder(const PanelShape& shape, const Matrices::Weight& w, const qg_weight& refs, float* room)
      : a_(shape.a), w_(w), refs_(refs), groups_(shape.groups), scales_(room),
        biases_(room + groups_ * kLanes) {}

  // Rows from `first` on; those past the last are the last again.
  void fill(long first, long begin, long end, float* panel) {
    long bytes = a_.k * a_.bits / 8;
    Ints offsets;
    for (int i = 0; i < kLanes; i++) offsets[i] = (first + i < a_.n ? i : a_.n - 1 - first) * bytes;
    find_scales(first, begin / a_.group, over(end, a_.group));
    const uint8_t* codes = (const uint8_t*)w_.codes + first * bytes;
    for (long at = begin; at < end;) {
      if (U::kBytes == 4 && at + U::kBlock <= end) {
        Words square[kLanes];
        for (int i = 0; i < kLanes; i++)
          square[i] = load<Words>(codes + offsets[i] + at / U::kCodes * 4);
        transpose(square);
        for (int i = 0; i < kLanes; i++, at += U::kCodes, panel += U::kCodes * kWide)
          decode(U{square[i], Words{}}, at, panel);
      } else {
        decode(U::at(codes + at / U::kCodes * U::kBytes, offsets, at > 0), at, panel);
        at += U::kCodes, panel += U::kCodes * kWide;
      }
    }
  }

 private:
  // Of groups `from` to `to` of a row, which lie in each lane then.
  void find_scales(long first, long from, long to) {
    group_ = from;
    float *few = biases_ + groups_ * kLanes, *biases = few + floats_of(groups_);
    for (int i = 0; i < kLanes; i++) {
      long row = first + i < a_.n ? first + i : a_.n - 1;
      group_scales(a_, w_, refs_, row * groups_ + from, to - from, Code::kCentre, few, biases);
      for (long g = 0; g < to - from; g++) {
        scales_[g * kLanes + i] = few[g];
        if (Code::kBiased) biases_[g * kLanes + i] = biases[g];
      }
    }
  }

  void decode(const U& units, long at, float* panel) const {
    long group = (at / a_.group - group_) * kLanes;
    Floats scale = load<Floats>(scales_ + group), bias{};
    if (Code::kBiased) bias = load<Floats>(biases_ + group);
    decode(units, scale, bias, panel, std::make_integer_sequence<int, U::kCodes>());
  }

  template <int... c>
  void decode(const U& units, Floats scale, Floats bias, float* panel,
              std::integer_sequence<int, c...>) const {
    (store(panel + c * kWide, code_.value(units.template low_bits<c>()) * scale + bias), ...);
  }

  const Code code_{};
  const qg_matmul& a_;
  const Matrices::Weight& w_;
  const qg_weight& refs_;
  long groups_, group_ = 0;  // the first that `scales_` has
  float *scales_, *biases_;
};

// A packed weight (k, n): codes of one row of it are columns of y.
template <typename Code>
void decode_columns(const PanelShape& shape, const Matrices::Weight& w, const qg_weight& refs,
                    long first, long begin, long end, float* panel, float* room) {
  using U = Units<Code>;
  const Code code{};
  const qg_matmul& a = shape.a;
  long bytes = a.n * a.bits / 8, count = a.n - first < kWide ? a.n - first : kWide;
  long group = first / a.group, groups = over(first + count, a.group) - group;
  for (long row = begin; row < end; row++, panel += kWide) {
    float *scales = room, *biases = room + 16;
    group_scales(a, w, refs, row * shape.groups + group, groups, Code::kCentre, scales, biases);
    const uint8_t* codes = (const uint8_t*)w.codes + row * bytes;
    for (long j = 0; j < count; j += kLanes) {
      Words low;
      for (int i = 0; i < kLanes; i++) {
        long bit = (first + (j + i < count ? j + i : 0)) * U::kBits, byte = bit / 8;
        uint32_t two = codes[byte] | (byte + 1 < bytes ? codes[byte + 1] << 8 : 0);
        low[i] = two >> (bit % 8);
      }
      Floats scale, bias{};
      for (int i = 0; i < kLanes; i++) {
        long g = (first + (j + i < count ? j + i : 0)) / a.group - group;
        scale[i] = scales[g];
        if (Code::kBiased) bias[i] = biases[g];
      }
      store(panel + j, code.value(low) * scale + bias);
    }
  }
}

template <typename D>
void turn(const qg_matmul& a, const typename D::Stored* w, long first, long begin, long end,
          float* panel) {
  long count = a.n - first < kWide ? a.n - first : kWide;
  const auto* from = w + first * a.w_row;
  if (a.w_row == 1 && count == kWide) {
    for (long k = begin; k < end; k++, panel += kWide)
      for (long j = 0; j < kWide; j += kLanes) {
        __builtin_prefetch(from + (k + 16) * a.w_column + j);  // rows lie far from each other
        store(panel + j, D::load(from + k * a.w_column + j));
      }
    return;
  }
  long k = begin;
  if (a.w_column == 1)
    for (; k + kLanes <= end; k += kLanes)
      for (long j = 0; j < count; j += kLanes) {
        Floats square[kLanes];
        for (int i = 0; i < kLanes; i++)
          square[i] = D::load(from + (j + i < count ? j + i : count - 1) * a.w_row + k);
        transpose(square);
        for (int i = 0; i < kLanes; i++) store(panel + (k - begin + i) * kWide + j, square[i]);
      }
  for (; k < end; k++)
    widen<D>(from + k * a.w_column, a.w_row, panel + (k - begin) * kWide, count);
}

template <typename D>
void pack(const typename D::Stored* x, long row, long column, long rows, long k, float* to) {
  static_assert(kTall <= kLanes || kTall % kLanes == 0);  // what a store spoils is written later
  for (long first = 0; first < rows; first += kLanes)
    for (long at = 0; at < k; at += kLanes) {
      long count = k - at < kLanes ? k - at : kLanes;
      Floats square[kLanes];
      for (long i = 0; i < kLanes; i++) {
        const auto* from = x + (first + i < rows ? first + i : rows - 1) * row + at * column;
        if (column == 1 && count == kLanes) {
          square[i] = D::load(from);
        } else {
          float few[kLanes] = {};
          widen<D>(from, column, few, count);
          square[i] = load<Floats>(few);
        }
      }
      transpose(square);
      for (long i = 0; i < count; i++) store(to + (at + i) * kTall + first, square[i]);
    }
}

}  // namespace

void pack_rows(int dtype, const char* x, long row, long column, long rows, long k, float* to) {
  of_float(dtype, [&](auto d) {
    using D = decltype(d);
    pack<D>((const typename D::Stored*)x, row, column, rows, k, to);
  });
}

long panel_room(const PanelShape& shape) {
  return shape.groups ? 2 * shape.groups * kLanes + 2 * floats_of(shape.groups) + 64 : 0;
}

void fill_panel(const PanelShape& shape, const Matrices::Weight& w, const qg_weight& refs,
                long first, long begin, long end, float* panel, float* room) {
  const qg_matmul& a = shape.a;
  if (a.mode == QG_DENSE)
    return of_float(refs.codes.dtype, [&](auto d) {
      using D = decltype(d);
      turn<D>(a, (const typename D::Stored*)w.codes, first, begin, end, panel);
    });
  of_code(a.mode, a.bits, [&](auto code) {
    using Code = decltype(code);
    if (a.columns_first)
      return decode_columns<Code>(shape, w, refs, first, begin, end, panel, room);
    Decoder<Code> decoder(shape, w, refs, room);
    for (long j = 0; j < kWide && first + j < a.n; j += kLanes)
      decoder.fill(first + j, begin, end, panel + j);
  });
}

}  // namespace qgraph
