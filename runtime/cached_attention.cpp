// Attention of a few tokens over a cache, on a CPU: keys and values are read once, where they lie.
//
// A token that is generated asks every earlier key and value once, so its time is that of reading them. Query heads that
// share a key head are multiplied by it while it is at hand.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>

// Mirrors Arguments in cached_attention.py. Strides are in elements; the innermost is 1. Sizes are multiples of WIDTH.
struct Arguments {
  int64_t batch, heads, key_heads, tokens, earlier, size, value_size, threads, is_boolean;
  int64_t q_strides[3], past_k_strides[3], k_strides[3], past_v_strides[3], v_strides[3], mask_strides[4];
  double scale;
  const void *q, *past_k, *k, *past_v, *v;
  const void* mask;  // bool, or float added to the scores: [batch, heads, tokens, earlier + tokens]
  void* out;         // [batch, tokens, heads, value_size]
};

namespace {

constexpr int64_t SERIAL = 32 * 1024;  // fewer products are not worth another thread
constexpr int64_t WIDTH = 8, ABREAST = 4;

// Vectors of the compiler's own: two instructions each where the CPU has half of their width.
typedef float Lanes __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t Whole __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(16), aligned(2), may_alias));

struct BFloat16 {
  uint16_t bits;
};

Lanes load(const float* from) { return *reinterpret_cast<const Lanes*>(from); }

Lanes load(const BFloat16* from) {
  const Halves bits = *reinterpret_cast<const Halves*>(from);
  return reinterpret_cast<Lanes>(__builtin_convertvector(bits, Words) << 16);
}

void store(Lanes values, float* to) { *reinterpret_cast<Lanes*>(to) = values; }

void store(Lanes values, BFloat16* to) {  // to the nearest, ties to even
  const Words bits = reinterpret_cast<Words>(values), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Whole number = values == values;
  const Words kept = reinterpret_cast<Words>(number);
  *reinterpret_cast<Halves*>(to) = __builtin_convertvector((rounded & kept) | (~kept & 0x7fc0), Halves);
}

float sum(Lanes v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

// e^x of x <= 0: 2^n times the polynomial of the rest (Cephes' expf); what is no number stays so.
Lanes exponential(Lanes x) {
  const Lanes shift = Lanes{} + 12582912.f;  // 1.5 * 2^23: adding it rounds to a whole number
  const Lanes scaled = x * 1.44269504f + shift, n = scaled - shift;
  const Lanes r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Lanes y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.f;
  const Lanes power = reinterpret_cast<Lanes>((reinterpret_cast<Whole>(scaled) + 127) << 23);
  return x < -87.f ? Lanes{} : y * power;
}

// Where a query's row begins in a tensor with strides of batch, head and token.
int64_t place(const Arguments& a, int64_t row, const int64_t* strides) {
  const int64_t token = row % a.tokens, head = row / a.tokens % a.heads, batch = row / a.tokens / a.heads;
  return batch * strides[0] + head * strides[1] + token * strides[2];
}

// Keys or values of one token, of the cache or of this call: all heads of a row of the batch.
template <typename T>
struct Heads {
  const T* first;
  int64_t stride;
};

template <typename T>
Heads<T> heads_of(const Arguments& a, const void* past, const void* now, const int64_t* past_strides,
                  const int64_t* strides, int64_t t, int64_t batch) {
  if (t < a.earlier)
    return {static_cast<const T*>(past) + t * past_strides[0] + batch * past_strides[1], past_strides[2]};
  return {static_cast<const T*>(now) + (t - a.earlier) * strides[2] + batch * strides[0], strides[1]};
}

// Products of one key with consecutive queries; `scores` are those of one token, `step` apart.
template <int QUERIES, typename T>
void products(const T* key, const float* query, int64_t size, float* scores, int64_t step) {
  Lanes sums[QUERIES] = {};
  for (int64_t d = 0; d < size; d += WIDTH) {
    const Lanes k = load(key + d);
    for (int i = 0; i < QUERIES; i++) sums[i] += k * load(query + i * size + d);
  }
  for (int i = 0; i < QUERIES; i++) scores[i * step] = sum(sums[i]);
}

// Scores of one query, filled up to whole vectors, to its shares of the values. All are 0 if it sees no key.
void to_shares(const Arguments& a, float* scores, int64_t total, int64_t whole, int64_t first) {
  const float hidden = -std::numeric_limits<float>::infinity();
  const int64_t step = a.mask_strides[3];
  bool seen = !a.is_boolean;
  if (a.is_boolean) {
    const bool* mask = static_cast<const bool*>(a.mask) + first;
    for (int64_t t = 0; t < total; t++) {
      const bool sees = mask[t * step];
      seen |= sees;
      scores[t] = sees ? scores[t] : hidden;
    }
  } else {
    const float* mask = static_cast<const float*>(a.mask) + first;
    for (int64_t t = 0; t < total; t++) scores[t] += mask[t * step];
  }
  std::fill(scores + total, scores + whole, hidden);
  if (!seen) return std::fill(scores, scores + whole, 0.f);
  Lanes most = Lanes{} + hidden, sums = {};
  for (int64_t t = 0; t < whole; t += WIDTH) {
    const Lanes s = load(scores + t);
    most = s > most ? s : most;
  }
  float top = hidden;
  for (int i = 0; i < WIDTH; i++) top = std::max(top, most[i]);
  for (int64_t t = 0; t < whole; t += WIDTH) {
    const Lanes e = exponential(load(scores + t) - top);
    sums += e;
    store(e, scores + t);
  }
  const float share = 1 / sum(sums);
  for (int64_t t = 0; t < whole; t += WIDTH) store(load(scores + t) * share, scores + t);
}

// Threads divide tokens, so that each reads its part of the cache from the first byte to the last.
template <typename T>
int attend(const Arguments& a) {
  const int64_t total = a.earlier + a.tokens, whole = (total + WIDTH - 1) / WIDTH * WIDTH;
  const int64_t together = a.heads / a.key_heads * a.tokens;  // queries that share a key head
  const int64_t rows = a.batch * a.key_heads * together;
  const int64_t counts[] = {rows * a.size, rows * whole, a.threads * rows * a.value_size};
  const std::unique_ptr<float[]> held(new (std::nothrow) float[counts[0] + counts[1] + counts[2]]());
  if (held == nullptr) return 1;
  const int64_t out_strides[] = {a.tokens * a.heads * a.value_size, a.value_size, a.heads * a.value_size};
  float *queries = held.get(), *scores = queries + counts[0], *sums = scores + counts[1];
#pragma omp parallel num_threads(a.threads) if (rows * total * a.size >= SERIAL)
  {
    float* mine = sums + omp_get_thread_num() * rows * a.value_size;
#pragma omp for
    for (int64_t row = 0; row < rows; row++) {
      const T* q = static_cast<const T*>(a.q) + place(a, row, a.q_strides);
      for (int64_t d = 0; d < a.size; d += WIDTH)
        store(load(q + d) * static_cast<float>(a.scale), queries + row * a.size + d);
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < total; t++)
      for (int64_t n = 0; n < a.batch * a.key_heads; n++) {
        const Heads<T> keys = heads_of<T>(a, a.past_k, a.k, a.past_k_strides, a.k_strides, t, n / a.key_heads);
        const T* key = keys.first + n % a.key_heads * keys.stride;
        const float* query = queries + n * together * a.size;
        float* to = scores + n * together * whole + t;
        int64_t i = 0;
        for (; i + ABREAST <= together; i += ABREAST)
          products<ABREAST>(key, query + i * a.size, a.size, to + i * whole, whole);
        for (; i < together; i++) products<1>(key, query + i * a.size, a.size, to + i * whole, whole);
      }
#pragma omp for
    for (int64_t row = 0; row < rows; row++) {
      to_shares(a, scores + row * whole, total, whole, place(a, row, a.mask_strides));
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < total; t++)
      for (int64_t n = 0; n < a.batch * a.key_heads; n++) {
        const Heads<T> values = heads_of<T>(a, a.past_v, a.v, a.past_v_strides, a.v_strides, t, n / a.key_heads);
        const T* value = values.first + n % a.key_heads * values.stride;
        for (int64_t row = n * together; row < (n + 1) * together; row++) {
          const float share = scores[row * whole + t];
          float* to = mine + row * a.value_size;
          for (int64_t d = 0; d < a.value_size; d += WIDTH) store(load(to + d) + share * load(value + d), to + d);
        }
      }
#pragma omp for
    for (int64_t row = 0; row < rows; row++) {
      T* out = static_cast<T*>(a.out) + place(a, row, out_strides);
      for (int64_t d = 0; d < a.value_size; d += WIDTH) {
        Lanes all = {};
        for (int64_t i = 0; i < a.threads; i++) all += load(sums + (i * rows + row) * a.value_size + d);
        store(all, out + d);
      }
    }
  }
  return 0;
}

}  // namespace

extern "C" int cached_attention_float32(const Arguments* arguments) { return attend<float>(*arguments); }

extern "C" int cached_attention_bfloat16(const Arguments* arguments) { return attend<BFloat16>(*arguments); }
