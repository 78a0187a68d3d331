// The kernels of `reference.py` on a CPU. One pass over the residual stream, in blocks of rows that stay in the cache,
// in place of one pass per operation; no Python between a compiled graph and the work.
//
// What each kernel computes is said there; this file says only how.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>
#include <limits>

namespace {

using at::Tensor;

constexpr int64_t kBlock = 64;       // rows of float32 that a core's cache holds beside their directions
constexpr int64_t kFew = 8;          // rows that are multiplied here
constexpr int64_t kPanel = 64;       // guard.scores.PANEL: what the vector registers hold of four rows
constexpr float kShortest = 1e-15f;  // guard.scores.SHORTEST
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

inline float widened(float value) { return value; }

inline float widened(c10::BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.x) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

inline float widened(c10::Half value) { return static_cast<float>(value); }

// out = hidden + residual, each of `width` elements.
template <typename scalar>
void add_row(const scalar* hidden, const scalar* residual, float* out, int64_t width) {
  if (residual == nullptr) {
    for (int64_t i = 0; i < width; ++i) out[i] = widened(hidden[i]);
  } else {
    for (int64_t i = 0; i < width; ++i) out[i] = widened(hidden[i]) + widened(residual[i]);
  }
}

float length_of(const float* row, int64_t width) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < width; ++i) squares += row[i] * row[i];
  const float length = std::sqrt(squares);
  // A length that float32 cannot hold would make cosines of zero, which is what clean looks like.
  return length > kShortest && std::isfinite(length) ? length : kNaN;
}

Tensor as_float(float* data, int64_t rows, int64_t columns) {
  return at::from_blob(data, {rows, columns}, at::TensorOptions().dtype(at::kFloat));
}

// rows [count, width] times directions [K, width], transposed. Few rows: each direction is read once, by one core, which
// a library's matrix product, made for many rows, does not do.
void multiply(const float* rows, int64_t count, const Tensor& directions, Tensor& products) {
  const int64_t all = directions.size(0), width = directions.size(1);
  if (count > kFew) {
    at::mm_out(products, as_float(const_cast<float*>(rows), count, width), directions.t());
    return;
  }
  const float* direction = directions.const_data_ptr<float>();
  float* product = products.mutable_data_ptr<float>();
  at::parallel_for(0, all, (all + 1) / 2, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const float* u = direction + k * width;
      int64_t row = 0;
      for (; row + 4 <= count; row += 4) {
        const float *a = rows + row * width, *b = a + width, *c = b + width, *d = c + width;
        float along_a = 0, along_b = 0, along_c = 0, along_d = 0;
#pragma omp simd reduction(+ : along_a, along_b, along_c, along_d)
        for (int64_t i = 0; i < width; ++i) {
          along_a += u[i] * a[i];
          along_b += u[i] * b[i];
          along_c += u[i] * c[i];
          along_d += u[i] * d[i];
        }
        product[row * all + k] = along_a;
        product[(row + 1) * all + k] = along_b;
        product[(row + 2) * all + k] = along_c;
        product[(row + 3) * all + k] = along_d;
      }
      for (; row + 2 <= count; row += 2) {
        const float *a = rows + row * width, *b = a + width;
        float along_a = 0, along_b = 0;
#pragma omp simd reduction(+ : along_a, along_b)
        for (int64_t i = 0; i < width; ++i) {
          along_a += u[i] * a[i];
          along_b += u[i] * b[i];
        }
        product[row * all + k] = along_a;
        product[(row + 1) * all + k] = along_b;
      }
    }
  });
}

template <typename scalar>
void read_rows(const Tensor& hidden, const Tensor* residual, const Tensor& directions, const Tensor& decisions,
               Tensor& previous, Tensor& cosines, Tensor& full, Tensor& lengths) {
  const int64_t tokens = hidden.size(0), width = hidden.size(1);
  const int64_t all = directions.size(0), every = cosines.size(1), capacity = full.size(1);
  const int64_t* rows = decisions.const_data_ptr<int64_t>();
  const int64_t deciding = rows[0];
  ++rows;
  for (int64_t d = 0; d < deciding; ++d)
    TORCH_CHECK(rows[d] >= 0 && rows[d] < tokens, "undertow::read: decision row ", rows[d], " of ", tokens, " rows");
  const scalar* in = hidden.const_data_ptr<scalar>();
  const scalar* carried = residual == nullptr ? nullptr : residual->const_data_ptr<scalar>();
  float* before = previous.mutable_data_ptr<float>();
  float* found = full.mutable_data_ptr<float>();
  float* cosine = cosines.mutable_data_ptr<float>();
  float* length = lengths.mutable_data_ptr<float>();

  // Decisions: where the residual stands, and what the layer wrote, in one product with every direction.
  if (deciding > 0) {
    Tensor pair = at::empty({2 * deciding, width}, directions.options());
    float* both = pair.mutable_data_ptr<float>();
    for (int64_t d = 0; d < deciding; ++d) {
      float *stands = both + d * width, *wrote = both + (deciding + d) * width, *old = before + d * width;
      add_row(in + rows[d] * width, carried == nullptr ? nullptr : carried + rows[d] * width, stands, width);
      for (int64_t i = 0; i < width; ++i) {
        wrote[i] = stands[i] - old[i];
        old[i] = stands[i];
      }
      length[rows[d]] = length_of(stands, width);
    }
    if (all > 0) {
      Tensor products = at::empty({2 * deciding, all}, directions.options());
      multiply(both, 2 * deciding, directions, products);
      const float* product = products.const_data_ptr<float>();
      for (int64_t d = 0; d < deciding; ++d) {
        const float one = length[rows[d]] / length[rows[d]];  // NaN where the length is
        for (int64_t k = 0; k < all; ++k) {
          found[d * all + k] = product[d * all + k] * one;
          found[capacity * all + d * all + k] = product[(deciding + d) * all + k] * one;
        }
        for (int64_t k = 0; k < every; ++k)
          cosine[rows[d] * every + k] = product[d * all + k] / length[rows[d]];
      }
    }
  }
  if (deciding == tokens) return;

  const Tensor read = directions.narrow(0, 0, every).t();
  at::parallel_for(0, (tokens + kBlock - 1) / kBlock, 1, [&](int64_t begin, int64_t end) {
    at::NoGradGuard quiet;
    std::vector<float> sums(kBlock * width);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlock, count = std::min(kBlock, tokens - first);
      for (int64_t row = 0; row < count; ++row) {
        const int64_t at = (first + row) * width;
        add_row(in + at, carried == nullptr ? nullptr : carried + at, sums.data() + row * width, width);
      }
      if (every > 0) {
        Tensor out = as_float(cosine + first * every, count, every);
        at::mm_out(out, as_float(sums.data(), count, width), read);
      }
      for (int64_t row = 0; row < count; ++row) {
        const float own = length_of(sums.data() + row * width, width);
        length[first + row] = own;
        for (int64_t k = 0; k < every; ++k) cosine[(first + row) * every + k] /= own;
      }
    }
  });
}

void read_stream(const Tensor& hidden, const std::optional<Tensor>& residual, const Tensor& directions,
          const Tensor& decisions, Tensor previous, Tensor cosines, Tensor full, Tensor lengths, Tensor count) {
  const Tensor in = hidden.contiguous();
  const Tensor carried = residual.has_value() ? residual->contiguous() : Tensor();
  TORCH_CHECK(!carried.defined() || carried.scalar_type() == in.scalar_type(),
              "undertow::read: hidden and residual differ in dtype");
  const Tensor* other = carried.defined() ? &carried : nullptr;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, in.scalar_type(), "undertow::read", [&] {
    if constexpr (!std::is_same_v<scalar_t, double>)
      read_rows<scalar_t>(in, other, directions, decisions, previous, cosines, full, lengths);
    else
      TORCH_CHECK(false, "undertow::read: float64 is not served");
  });
  int64_t* counted = count.mutable_data_ptr<int64_t>();
  counted[0] += 1;
  counted[1] += in.size(0);
}

inline float outside(float cosine, float low, float high) {
  const float above = cosine - high, below = low - cosine;
  const float larger = above > below ? above : below;
  return above == above ? larger : above;  // where `below` is NaN, `larger` is
}

// The largest of `outside` over a row, and the first place that has it; NaN counts as the largest.
void worst_of(const float* row, const float* low, const float* high, int64_t width, float& value, int64_t& place) {
  constexpr int64_t kPart = 64;
  float largest = -std::numeric_limits<float>::infinity();
  int64_t where = 0;
  for (int64_t first = 0; first < width; first += kPart) {
    const int64_t last = std::min(first + kPart, width);
    float own = -std::numeric_limits<float>::infinity();
    int unknown = 0;
#pragma omp simd reduction(max : own) reduction(+ : unknown)
    for (int64_t i = first; i < last; ++i) {
      const float found = outside(row[i], low[i], high[i]);
      unknown += found != found;
      own = found > own ? found : own;
    }
    if (unknown) {
      for (where = first; !std::isnan(outside(row[where], low[where], high[where]));) ++where;
      value = kNaN;
      place = where;
      return;
    }
    if (own > largest) largest = own, where = first;
  }
  while (where + 1 < width && outside(row[where], low[where], high[where]) != largest) ++where;
  value = largest;
  place = where;
}

std::tuple<Tensor, Tensor> worst_outside(const Tensor& cosines, const Tensor& low, const Tensor& high) {
  const Tensor in = cosines.contiguous();
  const int64_t tokens = in.size(0), width = in.size(1), roles = low.size(0);
  Tensor values = at::empty({tokens, roles}, in.options());
  Tensor places = at::empty({tokens, roles}, in.options().dtype(at::kLong));
  const float *row = in.const_data_ptr<float>(), *lows = low.const_data_ptr<float>(), *highs = high.const_data_ptr<float>();
  float* value = values.mutable_data_ptr<float>();
  int64_t* place = places.mutable_data_ptr<int64_t>();
  at::parallel_for(0, tokens, kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token)
      for (int64_t role = 0; role < roles; ++role)
        worst_of(row + token * width, lows + role * width, highs + role * width, width, value[token * roles + role],
                 place[token * roles + role]);
  });
  return {values, places};
}

// acc[row][c] = sum over i of rows[row][i] * panel[i][c], for N rows and kPanel columns, then the squares of a row summed.
template <int N>
void panel_squares(const float* rows, int64_t stride, const float* panel, int64_t height, float* squares) {
  float sums[N][kPanel] = {};
  for (int64_t i = 0; i < height; ++i)
    for (int row = 0; row < N; ++row) {
      const float own = rows[row * stride + i];
#pragma omp simd
      for (int64_t c = 0; c < kPanel; ++c) sums[row][c] += own * panel[i * kPanel + c];
    }
  for (int row = 0; row < N; ++row) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < kPanel; ++c) sum += sums[row][c] * sums[row][c];
    squares[row] = sum;
  }
}

Tensor squares(const Tensor& deviations, at::TensorList panels) {
  const Tensor in = deviations.contiguous();
  const int64_t count = in.size(0), width = in.size(1), parts = static_cast<int64_t>(panels.size());
  if (count > kFew || panels[0].size(1) != kPanel) {
    Tensor sums = at::zeros({count}, in.options());
    for (const Tensor& panel : panels) sums += at::mm(in.narrow(1, 0, panel.size(0)), panel).square_().sum(-1);
    return sums;
  }
  Tensor sums = at::empty({parts, count}, in.options());
  const float* rows = in.const_data_ptr<float>();
  float* out = sums.mutable_data_ptr<float>();
  at::parallel_for(0, (parts + 1) / 2, 1, [&](int64_t begin, int64_t end) {
    at::NoGradGuard quiet;
    const auto one = [&](int64_t part) {
      const Tensor& panel = panels[part];
      const int64_t height = panel.size(0);
      if (panel.size(1) != kPanel) {  // the last
        const Tensor sum = at::mm(in.narrow(1, 0, height), panel).square_().sum(-1);
        std::memcpy(out + part * count, sum.const_data_ptr<float>(), count * sizeof(float));
        return;
      }
      const float* data = panel.const_data_ptr<float>();
      int64_t row = 0;
      for (; row + 4 <= count; row += 4) panel_squares<4>(rows + row * width, width, data, height, out + part * count + row);
      for (; row < count; ++row) panel_squares<1>(rows + row * width, width, data, height, out + part * count + row);
    };
    // Heights grow with the place: a short one with a long one, so that every core has as much to read.
    for (int64_t pair = begin; pair < end; ++pair) {
      one(pair);
      if (parts - 1 - pair != pair) one(parts - 1 - pair);
    }
  });
  return sums.sum(0);
}

Tensor gather(at::TensorList parts, int64_t rows) {
  int64_t width = 0;
  for (const Tensor& part : parts) width += part.size(1);
  Tensor whole = at::empty({rows, width}, at::TensorOptions().dtype(at::kFloat));
  float* out = whole.mutable_data_ptr<float>();
  for (const Tensor& part : parts) {
    const int64_t own = part.size(1), stride = part.stride(0);
    const float* in = part.const_data_ptr<float>();
    for (int64_t row = 0; row < rows && own > 0; ++row)
      std::memcpy(out + row * width, in + row * stride, own * sizeof(float));
    out += own;
  }
  return whole;
}

}  // namespace

TORCH_LIBRARY_IMPL(undertow, CPU, library) {
  library.impl("read", &read_stream);
  library.impl("worst", &worst_outside);
  library.impl("squares", &squares);
  library.impl("gather", &gather);
}
