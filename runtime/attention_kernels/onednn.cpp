// Attention and its gradient on a CPU, in tiles of 64 queries and 64 keys, after FlashAttention-2 (arXiv:2307.08691).
//
// Products are oneDNN's block matrix products through at::native::cpublas::brgemm: float32 or bfloat16 factors,
// float32 results, so that scores never lose bits to bfloat16 and every product runs at the speed of the inputs'
// dtype. Tiles that the mask hides are not computed. Query heads that share a key head read one packed copy of it.
// Nothing but the log-sum-exp of the scores is kept for backward.
//
// A right factor is packed as brgemm wants it: panels of 64 columns, in each panel the rows one after the other,
// for bfloat16 with rows 2i and 2i+1 interleaved (VNNI). Sizes are padded to whole tiles with zeros.

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

namespace {

using Vec = at::vec::Vectorized<float>;
using at::native::cpublas::brgemm;

constexpr int64_t TILE = 64;       // queries and keys
constexpr int64_t CHUNK = 8;       // tiles of keys whose scores are held at a time in the forward
constexpr int64_t SUMS_BYTES = 64 << 20;  // partial gradients of keys and values
constexpr float INF = std::numeric_limits<float>::infinity();

int64_t tiles(int64_t n) { return (n + TILE - 1) / TILE; }
int64_t padded(int64_t n) { return tiles(n) * TILE; }

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Uninitialised memory on cache lines.
template <typename T>
struct Buffer {
  std::unique_ptr<T, Free> memory;
  explicit Buffer(int64_t count)
      : memory(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64))) {
    if (memory == nullptr) throw std::bad_alloc();
  }
  T* get() const { return memory.get(); }
};

}  // namespace

// Mirrors Arguments in onednn.py. Strides are in elements; the last dimension is contiguous.
struct Arguments {
  int64_t batch, heads, key_heads, rows, size, value_size;
  int64_t q_strides[3], k_strides[3], v_strides[3], out_strides[3], grad_strides[3];
  int64_t mask_strides[2];  // of batch and heads; rows of the mask are contiguous
  int64_t threads;
  double scale;
  const void *q, *k, *v;
  const uint8_t* mask;  // [.., rows, rows]; null: causal
  void* out;            // forward: the result; backward: read
  float* lse;           // [batch, heads, rows]
  const void* grad;
  void *dq, *dk, *dv;  // contiguous
};

namespace {

template <typename T>
struct Kind;

template <>
struct Kind<float> {
  static constexpr int V = 1;  // rows interleaved in a packed factor
  static Vec exp(Vec x) { return x.exp(); }
  static void store(float* to, Vec a, Vec b) {
    a.store(to);
    b.store(to + Vec::size());
  }
  static void load(float* to, const float* from, int64_t n) {
    std::memcpy(to, from, n * sizeof(float));
  }
  static void interleave(float*, const float*, const float*) {}
};

template <>
struct Kind<at::BFloat16> {
  static constexpr int V = 2;
  static Vec exp(Vec x) { return x.exp_u20(); }  // 20 ulp of float32, far below bfloat16
  static void store(at::BFloat16* to, Vec a, Vec b) {
    at::vec::convert_from_float<at::BFloat16>(a, b).store(to);
  }
  static void load(float* to, const at::BFloat16* from, int64_t n) {
    const auto* words = reinterpret_cast<const uint16_t*>(from);
    auto* out = reinterpret_cast<uint32_t*>(to);
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<uint32_t>(words[i]) << 16;
  }
  static void interleave(at::BFloat16* to, const at::BFloat16* a, const at::BFloat16* b) {
    auto* pairs = reinterpret_cast<uint32_t*>(to);
    const auto *low = reinterpret_cast<const uint16_t*>(a),
               *high = reinterpret_cast<const uint16_t*>(b);
    for (int64_t i = 0; i < TILE; ++i) {
      pairs[i] = low[i] | static_cast<uint32_t>(high[i]) << 16;
    }
  }
};

// In T; n is a multiple of 16.
template <typename T>
void store(T* to, const float* from, int64_t n) {
  constexpr int64_t W = 2 * Vec::size();
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    Kind<T>::store(to + i, Vec::loadu(from + i), Vec::loadu(from + i + Vec::size()));
  }
  for (; i < n; ++i) to[i] = T(from[i]);
}

// to[c, r] = from[r, c]. 32-bit words of any kind.
void transpose(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to,
               int64_t to_stride) {
  constexpr int64_t W = Vec::size();
  for (int64_t r = 0; r < rows; r += W) {
    for (int64_t c = 0; c < columns; c += W) {
      at::vec::transpose_mxn<float>(from + r * stride + c, stride, to + c * to_stride + r,
                                    to_stride, static_cast<int>(std::min(W, rows - r)),
                                    static_cast<int>(std::min(W, columns - c)));
    }
  }
}

// The right factor B[k, n] = rows[k][n], k < depth; rows from `valid` on are zero. Panels over n.
template <typename T>
void pack(const T* rows, int64_t stride, int64_t valid, int64_t depth, int64_t columns, T* out) {
  constexpr int V = Kind<T>::V;
  for (int64_t first = 0; first < columns; first += TILE, out += depth * TILE) {
    const int64_t width = std::min(TILE, columns - first);
    for (int64_t k = 0; k < depth; k += V) {
      T* line = out + k * TILE;
      for (int v = 0; v < V; ++v) {
        const T* row = rows + (k + v) * stride + first;
        if (k + v < valid) {
          for (int64_t n = 0; n < width; ++n) line[n * V + v] = row[n];
        } else {
          for (int64_t n = 0; n < width; ++n) line[n * V + v] = T(0.f);
        }
      }
    }
  }
}

// The right factor B[k, n] = rows[n][k], n < TILE, as one panel; rows from `valid` on are zero.
template <typename T>
void pack_transposed(const T* rows, int64_t stride, int64_t valid, int64_t depth, T* out) {
  // Pairs of bfloat16 move as one 32-bit word.
  constexpr int V = Kind<T>::V;
  auto* words = reinterpret_cast<float*>(out);
  if (valid < TILE) std::fill(words, words + depth / V * TILE, 0.f);
  transpose(reinterpret_cast<const float*>(rows), stride / V, valid, depth / V, words, TILE);
}

// C[m, n] (+)= A[m, k] B[k, n], B packed with `depth` rows a panel, of which those from `from` are read.
template <typename T>
void product(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t depth,
             int64_t from, float* c, int64_t ldc, bool add) {
  for (int64_t first = 0; first < n; first += TILE) {
    const T* panel = b + (first / TILE) * depth * TILE + from * TILE;
    brgemm(m, std::min(TILE, n - first), k, lda, TILE, ldc, add, a, panel, c + first,
           Kind<T>::V == 2);
  }
}

template <typename T>
void copy_rows(const T* from, int64_t stride, int64_t valid, int64_t rows, int64_t size, T* to) {
  for (int64_t i = 0; i < rows; ++i) {
    if (i < valid) {
      std::memcpy(to + i * size, from + i * stride, size * sizeof(T));
    } else {
      std::fill(to + i * size, to + (i + 1) * size, T(0.f));
    }
  }
}

enum Seen : uint8_t { NONE, SOME, ALL };

// Which tiles of the mask are seen: [batch or 1, heads or 1, tiles, tiles]. Empty for a causal mask.
struct Mask {
  const Arguments& a;
  int64_t n, batches, heads;
  std::vector<uint8_t> seen;

  explicit Mask(const Arguments& a)
      : a(a),
        n(tiles(a.rows)),
        batches(a.mask_strides[0] ? a.batch : 1),
        heads(a.mask_strides[1] ? a.heads : 1) {
    if (a.mask == nullptr) return;
    seen.resize(batches * heads * n * n);
#pragma omp parallel for collapse(2) num_threads(a.threads)
    for (int64_t m = 0; m < batches * heads; ++m) {
      for (int64_t i = 0; i < n; ++i) {
        std::vector<int64_t> counts(n);
        const int64_t last = std::min((i + 1) * TILE, a.rows);
        for (int64_t row = i * TILE; row < last; ++row) {
          const uint8_t* bytes = matrix(m / heads, m % heads) + row * a.rows;
          for (int64_t j = 0; j < n; ++j) {
            const int64_t end = std::min((j + 1) * TILE, a.rows);
            int64_t count = 0;
            for (int64_t k = j * TILE; k < end; ++k) count += bytes[k];
            counts[j] += count;
          }
        }
        for (int64_t j = 0; j < n; ++j) {
          const int64_t all = (last - i * TILE) * (std::min((j + 1) * TILE, a.rows) - j * TILE);
          seen[(m * n + i) * n + j] = counts[j] == 0 ? NONE : counts[j] == all ? ALL : SOME;
        }
      }
    }
  }

  const uint8_t* matrix(int64_t b, int64_t h) const {
    return a.mask + b * a.mask_strides[0] + h * a.mask_strides[1];
  }

  bool causal() const { return a.mask == nullptr; }

  Seen tile(int64_t b, int64_t h, int64_t i, int64_t j) const {
    if (causal()) return j > i ? NONE : j == i ? SOME : ALL;
    const int64_t m = (batches > 1 ? b : 0) * heads + (heads > 1 ? h : 0);
    return static_cast<Seen>(seen[(m * n + i) * n + j]);
  }
};

float sum(Vec v) {
  return at::vec::vec_reduce_all<float>([](Vec x, Vec y) { return x + y; }, v);
}

float largest(const float* row, int64_t n) {
  Vec top(-INF);
  int64_t i = 0;
  for (; i + Vec::size() <= n; i += Vec::size()) top = at::vec::maximum(top, Vec::loadu(row + i));
  float result =
      at::vec::vec_reduce_all<float>([](Vec x, Vec y) { return at::vec::maximum(x, y); }, top);
  for (; i < n; ++i) result = row[i] <= result || result != result ? result : row[i];  // keeps NaN
  return result;
}

// p[i] = exp(scale * row[i] - top) for i < seen, else 0, i < width; returns the sum.
template <typename T>
float exponentials(const float* row, T* p, int64_t seen, int64_t width, float scale, float top) {
  constexpr int64_t W = Vec::size();
  const Vec factor(scale), high(top), zero(0.f);
  Vec total(0.f);
  int64_t i = 0;
  for (; i < seen; i += 2 * W) {
    Vec x = Kind<T>::exp(Vec::loadu(row + i) * factor - high);
    Vec y = Kind<T>::exp(Vec::loadu(row + i + W) * factor - high);
    if (seen - i < 2 * W) {
      x = Vec::set(zero, x, std::min<int64_t>(W, seen - i));
      y = Vec::set(zero, y, std::max<int64_t>(0, seen - i - W));
    }
    total = total + x + y;
    Kind<T>::store(p + i, x, y);
  }
  for (; i < width; i += 2 * W) Kind<T>::store(p + i, zero, zero);
  return sum(total);
}

template <typename T>
void forward(const Arguments& a) {
  const int64_t n = tiles(a.rows), rows = padded(a.rows), values = padded(a.value_size);
  const int64_t groups = a.batch * a.key_heads, shared = a.heads / a.key_heads;
  const auto *q = static_cast<const T*>(a.q), *k = static_cast<const T*>(a.k),
             *v = static_cast<const T*>(a.v);
  const auto scale = static_cast<float>(a.scale);
  const Mask mask(a);
  Buffer<T> keys(groups * rows * a.size), packed_values(groups * rows * values);
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t j = 0; j <= n; ++j) {
        const int64_t b = g / a.key_heads, h = g % a.key_heads;
        if (j == n) {
          pack(v + b * a.v_strides[0] + h * a.v_strides[1], a.v_strides[2], a.rows, rows,
               a.value_size, packed_values.get() + g * rows * values);
        } else {
          pack_transposed(
              k + b * a.k_strides[0] + h * a.k_strides[1] + j * TILE * a.k_strides[2],
              a.k_strides[2], std::min(TILE, a.rows - j * TILE), a.size,
              keys.get() + (g * n + j) * TILE * a.size);
        }
      }
    }
    Buffer<float> scores(TILE * CHUNK * TILE), result(TILE * a.value_size);
    Buffer<T> query(TILE * a.size), p(TILE * CHUNK * TILE);
    float top[TILE], sums[TILE];
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < a.batch * a.heads * n; ++item) {
      const int64_t i = n - 1 - item / (a.batch * a.heads);  // those with most keys first
      const int64_t b = item % (a.batch * a.heads) / a.heads, h = item % a.heads;
      const int64_t g = b * a.key_heads + h / shared, count = std::min(TILE, a.rows - i * TILE);
      copy_rows(q + b * a.q_strides[0] + h * a.q_strides[1] + i * TILE * a.q_strides[2],
                a.q_strides[2], count, TILE, a.size, query.get());
      std::fill(top, top + TILE, -INF);
      std::fill(sums, sums + TILE, 0.f);
      std::fill(result.get(), result.get() + TILE * a.value_size, 0.f);
      int64_t last = n;
      while (last > 0 && mask.tile(b, h, i, last - 1) == NONE) --last;
      int64_t start = 0;
      while (start < last && mask.tile(b, h, i, start) == NONE) ++start;
      for (int64_t chunk = start; chunk < last; chunk += CHUNK) {
        const int64_t wide = std::min(CHUNK, last - chunk), width = wide * TILE;
        const int64_t end = std::min(a.rows - chunk * TILE, width);  // keys that there are
        for (int64_t j = 0; j < wide; ++j) {
          product(TILE, TILE, a.size, query.get(), a.size,
                  keys.get() + (g * n + chunk + j) * TILE * a.size, a.size, 0,
                  scores.get() + j * TILE, width, false);
        }
        for (int64_t r = 0; r < TILE; ++r) {
          float* row = scores.get() + r * width;
          T* low = p.get() + r * width;
          int64_t seen = 0;
          if (r < count) {
            seen = end;
            if (mask.causal()) {
              seen = std::min(end, i * TILE + r + 1 - chunk * TILE);
            } else {
              const uint8_t* bytes = mask.matrix(b, h) + (i * TILE + r) * a.rows + chunk * TILE;
              for (int64_t c = 0; c < seen; ++c) row[c] = bytes[c] ? row[c] : -INF;
            }
          }
          const float before = top[r];
          const float high = seen > 0 ? scale * largest(row, seen) : -INF;
          if (high != high) {  // a score is NaN: so is the result
            std::fill(low, low + width, T(high));
            sums[r] = high;
            continue;
          }
          top[r] = std::max(before, high);
          if (seen <= 0 || top[r] == -INF) {
            std::fill(low, low + width, T(0.f));
          } else {
            const float total = exponentials(row, low, seen, width, scale, top[r]);
            const float factor = before == -INF ? 0.f : std::exp(before - top[r]);
            sums[r] = sums[r] * factor + total;
            if (factor != 1.f) {
              float* line = result.get() + r * a.value_size;
              for (int64_t c = 0; c < a.value_size; ++c) line[c] *= factor;
            }
          }
        }
        product(TILE, a.value_size, width, p.get(), width,
                packed_values.get() + g * rows * values, rows, chunk * TILE, result.get(),
                a.value_size, true);
      }
      for (int64_t r = 0; r < count; ++r) {
        float* line = result.get() + r * a.value_size;
        const float factor = sums[r] == 0 ? 0.f : 1 / sums[r];
        for (int64_t c = 0; c < a.value_size; ++c) line[c] *= factor;
        store(static_cast<T*>(a.out) + b * a.out_strides[0] + h * a.out_strides[1] +
                  (i * TILE + r) * a.out_strides[2],
              line, a.value_size);
        a.lse[(b * a.heads + h) * a.rows + i * TILE + r] =
            sums[r] == 0 ? INF : top[r] + std::log(sums[r]);
      }
    }
    at::native::cpublas::brgemm_release(Kind<T>::V == 2);
  }
}

// What a tile of 64 queries brings to every tile of keys.
template <typename T>
struct Queries {
  Buffer<T> q, q_transposed, grad, grad_transposed;
  float lse[TILE], delta[TILE];

  explicit Queries(const Arguments& a)
      : q(TILE * padded(a.size)),
        q_transposed(TILE * a.size),
        grad(TILE * padded(a.value_size)),
        grad_transposed(TILE * a.value_size) {}

  void read(const Arguments& a, int64_t b, int64_t h, int64_t i) {
    const int64_t first = i * TILE, count = std::min(TILE, a.rows - first);
    const T* queries = static_cast<const T*>(a.q) + b * a.q_strides[0] + h * a.q_strides[1] +
                       first * a.q_strides[2];
    const T* grads = static_cast<const T*>(a.grad) + b * a.grad_strides[0] +
                     h * a.grad_strides[1] + first * a.grad_strides[2];
    const T* outs = static_cast<const T*>(a.out) + b * a.out_strides[0] + h * a.out_strides[1] +
                    first * a.out_strides[2];
    pack(queries, a.q_strides[2], count, TILE, a.size, q.get());
    pack_transposed(queries, a.q_strides[2], count, a.size, q_transposed.get());
    pack(grads, a.grad_strides[2], count, TILE, a.value_size, grad.get());
    pack_transposed(grads, a.grad_strides[2], count, a.value_size, grad_transposed.get());
    std::vector<float> x(a.value_size), y(a.value_size);
    for (int64_t r = 0; r < TILE; ++r) {
      lse[r] = INF, delta[r] = 0;
      if (r >= count) continue;
      lse[r] = a.lse[(b * a.heads + h) * a.rows + first + r];
      Kind<T>::load(x.data(), grads + r * a.grad_strides[2], a.value_size);
      Kind<T>::load(y.data(), outs + r * a.out_strides[2], a.value_size);
      Vec total(0.f);
      for (int64_t c = 0; c < a.value_size; c += Vec::size()) {
        total = total + Vec::loadu(x.data() + c) * Vec::loadu(y.data() + c);
      }
      delta[r] = sum(total);
    }
  }
};

// s and g: S^T and (grad V^T)^T of one tile, [keys, queries]. Makes P^T and dS^T in T, dS^T also packed.
template <typename T>
struct Tile {
  alignas(64) float s[TILE * TILE], g[TILE * TILE];
  alignas(64) T p[TILE * TILE], ds[TILE * TILE], packed[TILE * TILE];

  void probabilities(const float* lse, float scale, int64_t keys, bool diagonal,
                     const uint8_t* mask, int64_t stride, int64_t queries) {
    const Vec factor(scale);
    for (int64_t k = 0; k < TILE; ++k) {
      float* row = s + k * TILE;
      if (k >= keys) {
        std::fill(row, row + TILE, 0.f);
      } else {
        for (int64_t c = 0; c < TILE; c += Vec::size()) {
          Kind<T>::exp(Vec::loadu(row + c) * factor - Vec::loadu(lse + c)).store(row + c);
        }
        if (diagonal) std::fill(row, row + k, 0.f);
        if (mask != nullptr) {
          for (int64_t c = 0; c < queries; ++c) row[c] = mask[c * stride + k] ? row[c] : 0.f;
        }
      }
      store(p + k * TILE, row, TILE);
    }
  }

  void gradients(const float* delta, float scale) {
    constexpr int64_t W = Vec::size();
    const Vec factor(scale);
    for (int64_t k = 0; k < TILE; ++k) {
      for (int64_t c = 0; c < TILE; c += 2 * W) {
        const int64_t at = k * TILE + c;
        const Vec x = Vec::loadu(g + at) - Vec::loadu(delta + c);
        const Vec y = Vec::loadu(g + at + W) - Vec::loadu(delta + c + W);
        Kind<T>::store(ds + at, Vec::loadu(s + at) * x * factor, Vec::loadu(s + at + W) * y * factor);
      }
      if (k % 2) Kind<T>::interleave(packed + (k - 1) * TILE, ds + (k - 1) * TILE, ds + k * TILE);
    }
  }

  const T* right() const { return Kind<T>::V == 2 ? packed : ds; }
};

template <typename T>
void backward(const Arguments& a) {
  const int64_t n = tiles(a.rows), rows = padded(a.rows);
  const int64_t groups = a.batch * a.key_heads, shared = a.heads / a.key_heads;
  const auto *k = static_cast<const T*>(a.k), *v = static_cast<const T*>(a.v);
  const auto scale = static_cast<float>(a.scale);
  const Mask mask(a);
  // Tiles of queries of a group go round in `parts`, each with its own sums, so that all threads have work.
  const int64_t width = a.size + a.value_size;
  const int64_t most = SUMS_BYTES / (groups * rows * width * static_cast<int64_t>(sizeof(float)));
  const int64_t parts =
      std::clamp<int64_t>(std::min(most, (4 * a.threads + groups - 1) / groups), 1, n);
  Buffer<T> keys(groups * rows * a.size), turned(groups * rows * a.size),
      values(groups * rows * a.value_size);
  Buffer<float> sums(groups * parts * rows * width);
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t j = 0; j < n; ++j) {
        const int64_t b = g / a.key_heads, h = g % a.key_heads, first = j * TILE;
        const int64_t count = std::min(TILE, a.rows - first);
        T* own = keys.get() + (g * rows + first) * a.size;
        copy_rows(k + b * a.k_strides[0] + h * a.k_strides[1] + first * a.k_strides[2],
                  a.k_strides[2], count, TILE, a.size, own);
        copy_rows(v + b * a.v_strides[0] + h * a.v_strides[1] + first * a.v_strides[2],
                  a.v_strides[2], count, TILE, a.value_size,
                  values.get() + (g * rows + first) * a.value_size);
        T* to = turned.get() + (g * n + j) * TILE * a.size;  // [size, 64]
        for (int64_t c = 0; c < a.size; ++c) {
          for (int64_t r = 0; r < TILE; ++r) to[c * TILE + r] = own[r * a.size + c];
        }
      }
    }
    Queries<T> queries(a);
    auto tile = std::make_unique<Tile<T>>();
    Buffer<float> turned_dq(a.size * TILE), straight(TILE * a.size);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < groups * parts; ++item) {
      const int64_t part = item / groups, g = item % groups, b = g / a.key_heads;
      float* dk = sums.get() + (g * parts + part) * rows * width;
      float* dv = dk + rows * a.size;
      std::fill(dk, dk + rows * width, 0.f);
      for (int64_t h = g % a.key_heads * shared; h < (g % a.key_heads + 1) * shared; ++h) {
        for (int64_t i = part; i < n; i += parts) {
          queries.read(a, b, h, i);
          std::fill(turned_dq.get(), turned_dq.get() + a.size * TILE, 0.f);
          const int64_t count = std::min(TILE, a.rows - i * TILE);
          for (int64_t j = 0; j < n; ++j) {
            const Seen seen = mask.tile(b, h, i, j);
            if (seen == NONE) continue;
            const int64_t first = g * rows + j * TILE;
            product(TILE, TILE, a.size, keys.get() + first * a.size, a.size,
                    queries.q_transposed.get(), a.size, 0, tile->s, TILE, false);
            product(TILE, TILE, a.value_size, values.get() + first * a.value_size, a.value_size,
                    queries.grad_transposed.get(), a.value_size, 0, tile->g, TILE, false);
            const bool some = seen == SOME && !mask.causal();
            tile->probabilities(queries.lse, scale, std::min(TILE, a.rows - j * TILE),
                                mask.causal() && i == j,
                                some ? mask.matrix(b, h) + i * TILE * a.rows + j * TILE : nullptr,
                                a.rows, count);
            product(TILE, a.value_size, TILE, tile->p, TILE, queries.grad.get(), TILE, 0,
                    dv + j * TILE * a.value_size, a.value_size, true);
            tile->gradients(queries.delta, scale);
            product(TILE, a.size, TILE, tile->ds, TILE, queries.q.get(), TILE, 0,
                    dk + j * TILE * a.size, a.size, true);
            product(a.size, TILE, TILE, turned.get() + (g * n + j) * TILE * a.size, TILE,
                    tile->right(), TILE, 0, turned_dq.get(), TILE, true);
          }
          T* dq = static_cast<T*>(a.dq) + ((b * a.heads + h) * a.rows + i * TILE) * a.size;
          transpose(turned_dq.get(), TILE, a.size, TILE, straight.get(), a.size);
          store(dq, straight.get(), count * a.size);
        }
      }
    }
#pragma omp for collapse(2)
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t r = 0; r < a.rows; ++r) {
        for (int which = 0; which < 2; ++which) {
          const int64_t size = which ? a.value_size : a.size;
          float* first =
              sums.get() + g * parts * rows * width + (which ? rows * a.size : 0) + r * size;
          for (int64_t part = 1; part < parts; ++part) {
            const float* other = first + part * rows * width;
            for (int64_t c = 0; c < size; ++c) first[c] += other[c];
          }
          store(static_cast<T*>(which ? a.dv : a.dk) + (g * a.rows + r) * size, first, size);
        }
      }
    }
    at::native::cpublas::brgemm_release(Kind<T>::V == 2);
  }
}

enum Status { DONE, NO_MEMORY };

// Whether this CPU has the products, and oneDNN is switched on: an exception inside of a parallel region would end
// the process, so one small product is tried before each call.
template <typename T>
bool has_products() {
  try {
    Buffer<T> a(16 * 16), b(16 * TILE);
    Buffer<float> c(16 * 16);
    std::fill(a.get(), a.get() + 16 * 16, T(1.f));
    std::fill(b.get(), b.get() + 16 * TILE, T(1.f));
    brgemm(16, 16, 16, 16, TILE, 16, false, a.get(), b.get(), c.get(), Kind<T>::V == 2);
    at::native::cpublas::brgemm_release(Kind<T>::V == 2);
    return c.get()[0] == 16.f;
  } catch (...) {
    return false;
  }
}

int guarded(void (*run)(const Arguments&), const Arguments* a) {
  try {
    run(*a);
    return DONE;
  } catch (...) {
    return NO_MEMORY;
  }
}

}  // namespace

extern "C" {
int has_products_float32() { return has_products<float>(); }
int has_products_bfloat16() { return has_products<at::BFloat16>(); }
int forward_float32(const Arguments* a) { return guarded(forward<float>, a); }
int forward_bfloat16(const Arguments* a) { return guarded(forward<at::BFloat16>, a); }
int backward_float32(const Arguments* a) { return guarded(backward<float>, a); }
int backward_bfloat16(const Arguments* a) { return guarded(backward<at::BFloat16>, a); }
}
