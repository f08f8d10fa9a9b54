// Attention of a few tokens over a cache, on a CPU: keys and values are read once, where they lie.
//
// A token that is generated asks every earlier key and value once, so its time is that of reading them. Threads divide
// the tokens, so that each reads its part of the cache from the first byte to the last, eight tokens at a time: the sums
// of eight products are formed together, and eight values are added before a sum is stored.

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
constexpr int64_t WIDTH = 8;
constexpr int64_t APART = 32;          // floats between what two threads write, who would wait for each other's cache

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

#if defined(__clang__)
#define CHOOSE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define CHOOSE(a, b, ...) __builtin_shuffle(a, b, Whole{__VA_ARGS__})
#endif

// The sums of eight vectors, in order.
Lanes sums_of(const Lanes* v) {
  Lanes pairs[4], fours[2];
  for (int i = 0; i < 4; i++)
    pairs[i] = CHOOSE(v[2 * i], v[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
               CHOOSE(v[2 * i], v[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  for (int i = 0; i < 2; i++)
    fours[i] = CHOOSE(pairs[2 * i], pairs[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               CHOOSE(pairs[2 * i], pairs[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  return CHOOSE(fours[0], fours[1], 0, 1, 2, 3, 8, 9, 10, 11) + CHOOSE(fours[0], fours[1], 4, 5, 6, 7, 12, 13, 14, 15);
}

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

// Asks for the eight keys or values that come behind these.
template <typename T>
void fetch_next(const T* of, int64_t step, int64_t size) {
  constexpr int64_t LINE = 64 / sizeof(T);
  for (int j = 0; j < WIDTH; j++)
    for (int64_t d = 0; d < size; d += LINE) __builtin_prefetch(of + (WIDTH + j) * step + d);
}

// Products of `count` keys, eight at most and `step` apart, with one query.
template <typename T>
void products(const T* key, int64_t step, int64_t count, const float* query, int64_t size, float* scores) {
  if (count == WIDTH) {
    Lanes sums[WIDTH];
    for (int j = 0; j < WIDTH; j++) sums[j] = Lanes{};
    for (int64_t d = 0; d < size; d += WIDTH) {
      const Lanes q = load(query + d);
      for (int j = 0; j < WIDTH; j++) sums[j] += q * load(key + j * step + d);
    }
    return store(sums_of(sums), scores);
  }
  for (int64_t j = 0; j < count; j++, key += step) {
    Lanes sums = {};
    for (int64_t d = 0; d < size; d += WIDTH) sums += load(query + d) * load(key + d);
    scores[j] = sum(sums);
  }
}

// Adds `count` values, `step` apart, times their shares, to the sums of QUERIES queries.
template <int QUERIES, typename T>
void add_values(const T* value, int64_t step, int64_t count, const float* shares, int64_t whole, float* to, int64_t size) {
  for (int64_t d = 0; d < size; d += WIDTH) {
    Lanes sums[QUERIES];
    for (int i = 0; i < QUERIES; i++) sums[i] = load(to + i * size + d);
    for (int64_t t = 0; t < count; t++) {
      const Lanes v = load(value + t * step + d);
      for (int i = 0; i < QUERIES; i++) sums[i] += shares[i * whole + t] * v;
    }
    for (int i = 0; i < QUERIES; i++) store(sums[i], to + i * size + d);
  }
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

// Keys and values that lie alike: of the cache, or of this call. Strides are of token, row of the batch and head.
template <typename T>
struct Part {
  const T *keys, *values;
  int64_t key_strides[3], value_strides[3];
};

template <typename T>
int attend(const Arguments& a) {
  const int64_t total = a.earlier + a.tokens, whole = (total + WIDTH - 1) / WIDTH * WIDTH;
  const int64_t together = a.heads / a.key_heads * a.tokens;  // queries that share a key head
  const int64_t units = a.batch * a.key_heads, rows = units * together;
  const int64_t sums_each = rows * a.value_size + APART;
  const int64_t counts[] = {rows * a.size, rows * whole + APART, a.threads * sums_each};
  const std::unique_ptr<float[]> held(new (std::nothrow) float[counts[0] + counts[1] + counts[2]]());
  if (held == nullptr) return 1;
  float *queries = held.get(), *scores = queries + counts[0], *all_sums = scores + counts[1];
  const Part<T> cache{static_cast<const T*>(a.past_k),
                      static_cast<const T*>(a.past_v),
                      {a.past_k_strides[0], a.past_k_strides[1], a.past_k_strides[2]},
                      {a.past_v_strides[0], a.past_v_strides[1], a.past_v_strides[2]}};
  const Part<T> call{static_cast<const T*>(a.k),
                     static_cast<const T*>(a.v),
                     {a.k_strides[2], a.k_strides[0], a.k_strides[1]},
                     {a.v_strides[2], a.v_strides[0], a.v_strides[1]}};
  const int64_t out_strides[] = {a.tokens * a.heads * a.value_size, a.value_size, a.heads * a.value_size};
#pragma omp parallel num_threads(a.threads) if (rows * total * a.size >= SERIAL)
  {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    const int64_t each = (whole / WIDTH + threads - 1) / threads * WIDTH, end = std::min(total, (thread + 1) * each);
    // Calls `use(t, n, part, at, count)` for tokens of this thread, in the order of memory, and all of their heads.
    const auto for_tokens = [&](const auto& use) {
      for (int64_t t = thread * each, count; t < end; t += count) {
        const bool earlier = t < a.earlier;
        count = std::min(WIDTH, (earlier ? std::min(end, a.earlier) : end) - t);
        for (int64_t n = 0; n < units; n++) use(t, n, earlier ? cache : call, earlier ? t : t - a.earlier, count);
      }
    };
    const auto head_of = [&](const T* of, const int64_t* strides, int64_t n, int64_t at) {
      return of + at * strides[0] + n / a.key_heads * strides[1] + n % a.key_heads * strides[2];
    };
#pragma omp for
    for (int64_t row = 0; row < rows; row++) {
      const T* q = static_cast<const T*>(a.q) + place(a, row, a.q_strides);
      for (int64_t d = 0; d < a.size; d += WIDTH)
        store(load(q + d) * static_cast<float>(a.scale), queries + row * a.size + d);
    }
    for_tokens([&](int64_t t, int64_t n, const Part<T>& part, int64_t at, int64_t count) {
      const T* keys = head_of(part.keys, part.key_strides, n, at);
      fetch_next(keys, part.key_strides[0], a.size);
      for (int64_t row = n * together; row < (n + 1) * together; row++)
        products(keys, part.key_strides[0], count, queries + row * a.size, a.size, scores + row * whole + t);
    });
#pragma omp barrier
#pragma omp for
    for (int64_t row = 0; row < rows; row++)
      to_shares(a, scores + row * whole, total, whole, place(a, row, a.mask_strides));
    float* mine = all_sums + thread * sums_each;
    for_tokens([&](int64_t t, int64_t n, const Part<T>& part, int64_t at, int64_t count) {
      const T* values = head_of(part.values, part.value_strides, n, at);
      fetch_next(values, part.value_strides[0], a.value_size);
      const int64_t step = part.value_strides[0];
      for (int64_t row = n * together, left = together; left > 0;) {
        const float* shares = scores + row * whole + t;
        float* to = mine + row * a.value_size;
        const int64_t taken = left >= 6 ? 6 : left >= 3 ? 3 : 1;
        const auto add = taken == 6 ? add_values<6, T> : taken == 3 ? add_values<3, T> : add_values<1, T>;
        add(values, step, count, shares, whole, to, a.value_size);
        row += taken, left -= taken;
      }
    });
#pragma omp barrier
#pragma omp for
    for (int64_t row = 0; row < rows; row++) {
      T* out = static_cast<T*>(a.out) + place(a, row, out_strides);
      for (int64_t d = 0; d < a.value_size; d += WIDTH) {
        Lanes sums = {};
        for (int64_t i = 0; i < threads; i++) sums += load(all_sums + i * sums_each + row * a.value_size + d);
        store(sums, out + d);
      }
    }
  }
  return 0;
}

}  // namespace

extern "C" int cached_attention_float32(const Arguments* arguments) { return attend<float>(*arguments); }

extern "C" int cached_attention_bfloat16(const Arguments* arguments) { return attend<BFloat16>(*arguments); }
