// Elements of any float dtype to float32 and back: here once, as all sources want them.

#include "lanes.hpp"

namespace qgraph {

void widen(int dtype, const void* from, long step, float* to, long count) {
  of_float(dtype, [&](auto d) {
    using D = decltype(d);
    widen<D>((const typename D::Stored*)from, step, to, count);
  });
}

void narrow(int dtype, const float* from, void* to, long step, long count) {
  of_float(dtype, [&](auto d) {
    using D = decltype(d);
    narrow<D>(from, (typename D::Stored*)to, step, count);
  });
}

}  // namespace qgraph
