// Products of few rows with a matrix, on a CPU: each weight is read once, and one in 4 bits is never written out dense.
//
// A product of one row reads every weight once, so its time is that of reading them. Four columns of the result are formed
// at a time, for up to FEW rows. Of more rows than one, weights in 4 bits are looked up and scaled into a piece of
// memory that stays in the nearest cache, and multiplied from there; of one row they are multiplied where they were
// looked up, summed by block, and the sum of a block multiplied by its scale.
//
// Written for PyTorch's stable interface, so that what was compiled for one release runs on another.

#include <omp.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#include <immintrin.h>
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t FEW = 16;            // rows that are multiplied here; as in few_rows.py
constexpr int64_t STEP = 32;           // values looked up at a time: 16 bytes
constexpr int64_t PIECE = 256;         // values of a column that are multiplied at a time
constexpr int64_t TILE = 4;            // columns that are multiplied at a time
constexpr int64_t NESTED = 256;        // scales of a block of double quantization
constexpr int64_t SERIAL = 64 * 1024;  // fewer weights are not worth another thread

#if defined(CPU_CAPABILITY_AVX512)
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int VECTORS = STEP / LANES;

// Vectors of the compiler's own: several instructions each where the CPU's are narrower.
typedef float Lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

struct BFloat16 {
  uint16_t bits;
};

inline Lanes load(const float* from) { return *reinterpret_cast<const Lanes*>(from); }

inline void store(Lanes values, float* to) { *reinterpret_cast<Lanes*>(to) = values; }

// Let a value have a register of its own: the compiler reads it from memory once for each product otherwise.
#if defined(__AVX__)
#define KEEP(value) __asm__("" : "+x"(value))
#else
#define KEEP(value)
#endif

inline void fetch(const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(from + i);
}

inline float wide(float value) { return value; }

inline float wide(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::copy_n(reinterpret_cast<const char*>(&bits), 4, reinterpret_cast<char*>(&result));
  return result;
}

inline void narrow(float value, float* to) { *to = value; }

inline void narrow(float value, BFloat16* to) {  // to the nearest, ties to even
  uint32_t bits;
  std::copy_n(reinterpret_cast<const char*>(&value), 4, reinterpret_cast<char*>(&bits));
  to->bits = value == value ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : 0x7fc0;
}

inline float sum(Lanes v) {
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
}

// -- values of codes ----------------------------------------------------------------------------

// Of each kind of CPU: `look_up` finds STEP values, `arrange` puts STEP values of x in the order in which they are found.

#if defined(CPU_CAPABILITY_AVX512)

struct Levels {
  __m512 all;
  explicit Levels(const float* levels) : all(_mm512_loadu_ps(levels)) {}
  inline void look_up(const uint8_t* codes, Lanes* to) const {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m128i four = _mm_set1_epi8(15);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), four), low = _mm_and_si128(bytes, four);
    to[0] = (Lanes)_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(high, low)), all);
    to[1] = (Lanes)_mm512_permutexvar_ps(_mm512_cvtepu8_epi32(_mm_unpackhi_epi8(high, low)), all);
  }
};

void arrange(const float* x, float* to) { std::copy(x, x + STEP, to); }

#elif defined(CPU_CAPABILITY_AVX2)

// A shuffle of bytes looks 32 codes up at once, in a table of 16 bytes: so there is a table for each of the four bytes of
// a level, and what was found is interleaved to float32. That is done in each half of a register by itself.
struct Levels {
  __m256i bytes[4];
  explicit Levels(const float* levels) {
    alignas(16) uint8_t table[4][16];
    const uint8_t* of = reinterpret_cast<const uint8_t*>(levels);
    for (int i = 0; i < 16; i++)
      for (int b = 0; b < 4; b++) table[b][i] = of[4 * i + b];
    for (int b = 0; b < 4; b++)
      bytes[b] = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table[b])));
  }
  inline void look_up(const uint8_t* codes, Lanes* to) const {
    const __m128i read = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m128i four = _mm_set1_epi8(15);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(read, 4), four), low = _mm_and_si128(read, four);
    const __m256i places = _mm256_set_m128i(_mm_unpackhi_epi8(high, low), _mm_unpacklo_epi8(high, low));
    __m256i found[4];
    for (int b = 0; b < 4; b++) found[b] = _mm256_shuffle_epi8(bytes[b], places);
    const __m256i low_low = _mm256_unpacklo_epi8(found[0], found[1]);
    const __m256i low_high = _mm256_unpacklo_epi8(found[2], found[3]);
    const __m256i high_low = _mm256_unpackhi_epi8(found[0], found[1]);
    const __m256i high_high = _mm256_unpackhi_epi8(found[2], found[3]);
    to[0] = (Lanes)_mm256_unpacklo_epi16(low_low, low_high);
    to[1] = (Lanes)_mm256_unpackhi_epi16(low_low, low_high);
    to[2] = (Lanes)_mm256_unpacklo_epi16(high_low, high_high);
    to[3] = (Lanes)_mm256_unpackhi_epi16(high_low, high_high);
  }
};

void arrange(const float* x, float* to) {  // four values of the first half, four of the second, and so on
  for (int i = 0; i < 4; i++) {
    std::copy(x + 4 * i, x + 4 * i + 4, to + 8 * i);
    std::copy(x + 16 + 4 * i, x + 16 + 4 * i + 4, to + 8 * i + 4);
  }
}

#else

struct Levels {
  const float* levels;
  explicit Levels(const float* levels) : levels(levels) {}
  inline void look_up(const uint8_t* codes, Lanes* to) const {
    for (int i = 0; i < STEP / 2; i++) {
      to[2 * i / LANES][2 * i % LANES] = levels[codes[i] >> 4];
      to[2 * i / LANES][2 * i % LANES + 1] = levels[codes[i] & 15];
    }
  }
};

void arrange(const float* x, float* to) { std::copy(x, x + STEP, to); }

#endif

// -- weights --------------------------------------------------------------------------------------

// A matrix in 4 bits, [columns of the result, in]: two codes a byte, the first in the high half.
struct FourBit {
  const uint8_t* codes;
  const float* absmax;  // by block; null with double quantization, which has the next four
  const uint8_t* scales;
  const float *nested_absmax, *nested_levels, *offset;
  int64_t blocksize;
  Levels levels;

  inline float scale(int64_t block) const {
    if (absmax != nullptr) return absmax[block];
    return nested_levels[scales[block]] * nested_absmax[block / NESTED] + *offset;
  }

  // Values n to n + count, dense; `count` is a multiple of STEP.
  void look_up(int64_t n, int64_t count, float* to) const {
    const int64_t end = n + count;
    for (int64_t block = n / blocksize; n < end; block++) {
      const Lanes by = Lanes{} + scale(block);
      for (const int64_t stop = std::min(end, (block + 1) * blocksize); n < stop; n += STEP, to += STEP) {
        Lanes found[VECTORS];
        levels.look_up(codes + n / 2, found);
        for (int i = 0; i < VECTORS; i++) store(found[i] * by, to + i * LANES);
      }
    }
  }

  // The product of values n to n + count and one row.
  float times(int64_t n, int64_t count, const float* x) const {
    if (blocksize == 2 * STEP && n % blocksize == 0 && count % blocksize == 0) return times_blocks(n, count, x);
    const int64_t end = n + count;
    Lanes total = {};
    for (int64_t block = n / blocksize; n < end; block++) {
      Lanes part[VECTORS];
      for (int i = 0; i < VECTORS; i++) part[i] = Lanes{};
      for (const int64_t stop = std::min(end, (block + 1) * blocksize); n < stop; n += STEP, x += STEP)
        add(codes + n / 2, x, part);
      total += sum_of(part) * scale(block);
    }
    return sum(total);
  }

  // The same for whole blocks of QLoRA's size: two steps, without a loop.
  float times_blocks(int64_t n, int64_t count, const float* x) const {
    const uint8_t* from = codes + n / 2;
    Lanes total = {};
    for (int64_t block = n / (2 * STEP), end = (n + count) / (2 * STEP); block < end; block++) {
      Lanes part[VECTORS];
      for (int i = 0; i < VECTORS; i++) part[i] = Lanes{};
      add(from, x, part);
      add(from + STEP / 2, x + STEP, part);
      total += sum_of(part) * scale(block);
      from += STEP, x += 2 * STEP;
    }
    return sum(total);
  }

  inline void add(const uint8_t* from, const float* x, Lanes* part) const {
    Lanes found[VECTORS];
    levels.look_up(from, found);
    for (int i = 0; i < VECTORS; i++) part[i] += found[i] * load(x + i * LANES);
  }

  static inline Lanes sum_of(const Lanes* part) {
    if constexpr (VECTORS == 4) return (part[0] + part[2]) + (part[1] + part[3]);
    return part[0] + part[1];
  }
};

// -- products -------------------------------------------------------------------------------------

// Adds the products of ROWS rows and COLUMNS columns; sums are TILE apart from row to row.
template <int ROWS, int COLUMNS>
inline void add_products(const float* x, int64_t x_step, const float* w, int64_t w_step, int64_t count, Lanes* sums) {
  Lanes found[ROWS][COLUMNS];
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < COLUMNS; c++) found[r][c] = sums[r * TILE + c];
#pragma GCC unroll 2
  for (int64_t i = 0; i < count; i += LANES) {
    Lanes column[COLUMNS];
    for (int c = 0; c < COLUMNS; c++) column[c] = load(w + c * w_step + i);
    for (int r = 0; r < ROWS; r++) {
      Lanes row = load(x + r * x_step + i);
      KEEP(row);
      for (int c = 0; c < COLUMNS; c++) found[r][c] += row * column[c];
    }
  }
  for (int r = 0; r < ROWS; r++)
    for (int c = 0; c < COLUMNS; c++) sums[r * TILE + c] = found[r][c];
}

// The same for all rows, as many at a time as there are registers for.
template <int COLUMNS>
void add_columns(const float* x, int64_t x_step, int64_t rows, const float* w, int64_t w_step, int64_t count, Lanes* sums) {
  for (; rows >= 4; rows -= 4, x += 4 * x_step, sums += 4 * TILE) {
    if constexpr (COLUMNS == 4 && LANES == 8) {
      add_products<4, 2>(x, x_step, w, w_step, count, sums);
      add_products<4, 2>(x, x_step, w + 2 * w_step, w_step, count, sums + 2);
    } else {
      add_products<4, COLUMNS>(x, x_step, w, w_step, count, sums);
    }
  }
  if (rows >= 2) {
    add_products<2, COLUMNS>(x, x_step, w, w_step, count, sums);
    rows -= 2, x += 2 * x_step, sums += 2 * TILE;
  }
  if (rows >= 1) add_products<1, COLUMNS>(x, x_step, w, w_step, count, sums);
}

void add_tile(const float* x, int64_t x_step, int64_t rows, const float* w, int64_t w_step, int64_t columns, int64_t count,
              Lanes* sums) {
  if (columns == TILE) return add_columns<TILE>(x, x_step, rows, w, w_step, count, sums);
  for (int64_t c = 0; c < columns; c++) add_columns<1>(x, x_step, rows, w + c * w_step, w_step, count, sums + c);
}

struct Rows {
  const float* x;  // [rows, in], in the order in which weights are found
  int64_t rows, in;
};

// Products of all rows with columns o to o + columns, TILE at most; sums are TILE apart.
void multiply(const Rows& r, const FourBit& w, int64_t o, int64_t columns, float* to) {
  if (r.rows == 1) {
    for (int64_t c = 0; c < columns; c++) to[c] = w.times((o + c) * r.in, r.in, r.x);
    return;
  }
  alignas(64) float dense[TILE * PIECE];
  alignas(4 * LANES) Lanes sums[FEW * TILE];
  for (int64_t i = 0; i < r.rows * TILE; i++) sums[i] = Lanes{};
  for (int64_t i = 0; i < r.in; i += PIECE) {
    const int64_t count = std::min(PIECE, r.in - i);
    for (int64_t c = 0; c < columns; c++) w.look_up((o + c) * r.in + i, count, dense + c * PIECE);
    add_tile(r.x + i, r.in, r.rows, dense, PIECE, columns, count, sums);
  }
  for (int64_t i = 0; i < r.rows; i++)
    for (int64_t c = 0; c < columns; c++) to[i * TILE + c] = sum(sums[i * TILE + c]);
}

void multiply(const Rows& r, const float* w, int64_t o, int64_t columns, float* to) {
  alignas(4 * LANES) Lanes sums[FEW * TILE];
  for (int64_t i = 0; i < r.rows * TILE; i++) sums[i] = Lanes{};
  for (int64_t i = 0; i < r.in; i += PIECE) {
    fetch(w + (o + columns) * r.in + i * columns, PIECE * columns);  // of the next tile
    add_tile(r.x + i, r.in, r.rows, w + o * r.in + i, r.in, columns, std::min(PIECE, r.in - i), sums);
  }
  for (int64_t i = 0; i < r.rows; i++)
    for (int64_t c = 0; c < columns; c++) to[i * TILE + c] = sum(sums[i * TILE + c]);
}

// What is added to the product with the weights.
template <typename T>
struct Added {
  const T* bias;                 // [out], or null
  const float *lora_a, *lora_b;  // [rank, in], [out, rank]; null without an adapter
  int64_t rank;
  float scaling;
};

// y [rows, out]. `x` is in the order of memory, `arranged` in that of the weights; `low` has room for [rows, rank].
template <typename T, typename Weights>
void linear(const Rows& x, const Rows& arranged, const Weights& weights, const Added<T>& added, float* low, int64_t out,
            T* y) {
  const int64_t rank = added.rank;
#pragma omp parallel num_threads(torch::stable::get_num_threads()) if (out * x.in >= SERIAL)
  {
    float found[FEW * TILE];
#pragma omp for
    for (int64_t first = 0; first < rank; first += TILE) {
      const int64_t columns = std::min(TILE, rank - first);
      multiply(x, added.lora_a, first, columns, found);
      for (int64_t r = 0; r < x.rows; r++) std::copy_n(found + r * TILE, columns, low + r * rank + first);
    }
#pragma omp for schedule(static)
    for (int64_t first = 0; first < out; first += TILE) {
      const int64_t columns = std::min(TILE, out - first);
      multiply(arranged, weights, first, columns, found);
      for (int64_t r = 0; r < x.rows; r++)
        for (int64_t c = 0; c < columns; c++) {
          const float *b = added.lora_b + (first + c) * rank, *of = low + r * rank;
          float branch = 0;
          int64_t i = 0;
          Lanes sums = {};
          for (; i + LANES <= rank; i += LANES) sums += load(b + i) * load(of + i);
          for (; i < rank; i++) branch += b[i] * of[i];
          if (rank >= LANES) branch += sum(sums);
          const float bias = added.bias == nullptr ? 0.f : wide(added.bias[first + c]);
          narrow(found[r * TILE + c] + bias + added.scaling * branch, y + r * out + first + c);
        }
    }
  }
}

// -- operators ------------------------------------------------------------------------------------

template <typename T>
const T* pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

template <typename T>
const T* pointer(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? pointer<T>(*tensor) : nullptr;
}

std::vector<int64_t> sizes_of(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = last;
  return sizes;
}

// All of x, whatever its strides, in float32.
template <typename T>
void read(const Tensor& x, float* to) {
  const T* from = pointer<T>(x);
  const int64_t dims = x.dim(), in = x.size(dims - 1), step = x.stride(dims - 1), rows = in == 0 ? 0 : x.numel() / in;
  for (int64_t row = 0; row < rows; row++) {
    int64_t at = 0;
    for (int64_t dim = dims - 2, rest = row; dim >= 0; rest /= x.size(dim), dim--) at += rest % x.size(dim) * x.stride(dim);
    for (int64_t i = 0; i < in; i++) *to++ = wide(from[at + i * step]);
  }
}

template <typename T, typename Weights>
Tensor linear(const Tensor& x, int64_t out, const Weights& weights, bool as_found, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& lora_a, const std::optional<Tensor>& lora_b, double scaling) {
  const int64_t count = x.numel(), in = x.size(x.dim() - 1), rank = lora_a.has_value() ? lora_a->size(0) : 0;
  const Added<T> added{pointer<T>(bias), pointer<float>(lora_a), pointer<float>(lora_b), rank, static_cast<float>(scaling)};
  const int64_t rows = count / in;
  const std::unique_ptr<float[]> held(new float[2 * count + rows * rank]);
  float *plain = held.get(), *arranged = plain;
  read<T>(x, plain);
  if (as_found) {
    arranged += count;
    for (int64_t i = 0; i < count; i += STEP) arrange(plain + i, arranged + i);
  }
  const std::vector<int64_t> sizes = sizes_of(x, out);
  Tensor y = torch::stable::new_empty(x, {sizes.data(), sizes.size()});
  linear<T>({plain, rows, in}, {arranged, rows, in}, weights, added, plain + 2 * count, out, static_cast<T*>(y.data_ptr()));
  return y;
}

float levels_of[2][16];  // of nf4 and fp4

// Raises what a function of PyTorch's interface for C reports. Releases before 2.12 have another name for it.
#if defined(STABLE_TORCH_ERROR_CODE_CHECK)
#define CHECKED(call) STABLE_TORCH_ERROR_CODE_CHECK(call)
#else
#define CHECKED(call) TORCH_ERROR_CODE_CHECK(call)
#endif

// Whether these are few rows of this size, and all else lies in memory as the kernel reads it.
bool takes(const Tensor& x, int64_t size, std::initializer_list<const std::optional<Tensor>> others) {
  const bool few = x.numel() > 0 && x.size(x.dim() - 1) == size && x.numel() / size <= FEW;
  return few && std::all_of(others.begin(), others.end(), [](auto& t) { return !t.has_value() || t->is_contiguous(); });
}

Tensor linear_4bit(const Tensor& x, const Tensor& packed, const Tensor& absmax, const std::optional<Tensor>& nested_absmax,
                   const std::optional<Tensor>& offset, const std::optional<Tensor>& nested_quant_map,
                   const std::optional<Tensor>& bias, const std::optional<Tensor>& lora_a,
                   const std::optional<Tensor>& lora_b, double scaling, const std::vector<int64_t>& shape,
                   int64_t blocksize, const std::string& quant_type) {
  if (!takes(x, shape[1], {packed, absmax, nested_absmax, bias, lora_a, lora_b})) {
    using torch::stable::detail::from;
    std::array<StableIValue, 13> stack{from(x),      from(packed),  from(absmax), from(nested_absmax), from(offset),
                                       from(nested_quant_map), from(bias), from(lora_a), from(lora_b), from(scaling),
                                       from(shape), from(blocksize), from(quant_type)};
    CHECKED(torch_call_dispatcher("qlora_fx::linear_4bit", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
  const bool nested = nested_absmax.has_value();
  const FourBit weights{pointer<uint8_t>(packed),
                        nested ? nullptr : pointer<float>(absmax),
                        nested ? pointer<uint8_t>(absmax) : nullptr,
                        pointer<float>(nested_absmax),
                        pointer<float>(nested_quant_map),
                        pointer<float>(offset),
                        blocksize,
                        Levels(levels_of[quant_type == "fp4"])};
  if (x.scalar_type() == ScalarType::BFloat16)
    return linear<BFloat16>(x, shape[0], weights, true, bias, lora_a, lora_b, scaling);
  return linear<float>(x, shape[0], weights, true, bias, lora_a, lora_b, scaling);
}

Tensor linear_dense(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                    const std::optional<Tensor>& lora_a, const std::optional<Tensor>& lora_b, double scaling) {
  if (!takes(x, weight.size(1), {weight, bias, lora_a, lora_b})) {
    using torch::stable::detail::from;
    std::array<StableIValue, 6> stack{from(x), from(weight), from(bias), from(lora_a), from(lora_b), from(scaling)};
    CHECKED(torch_call_dispatcher("qlora_fx::linear_dense", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }
  const int64_t out = weight.size(0);
  return linear<float>(x, out, pointer<float>(weight), false, bias, lora_a, lora_b, scaling);
}

}  // namespace

// The 16 values that codes stand for, of nf4 and of fp4.
extern "C" void set_levels(const float* levels) { std::copy_n(levels, 32, levels_of[0]); }

STABLE_TORCH_LIBRARY(qlora_fx_cpu, m) {
  m.def(
      "linear_4bit(Tensor x, Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? offset, Tensor? "
      "nested_quant_map, Tensor? bias, Tensor? lora_a, Tensor? lora_b, float scaling, int[] shape, int blocksize, str "
      "quant_type) -> Tensor");
  m.def(
      "linear_dense(Tensor x, Tensor weight, Tensor? bias, Tensor? lora_a, Tensor? lora_b, float scaling) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_fx_cpu, CPU, m) {
  m.impl("linear_4bit", TORCH_BOX(&linear_4bit));
  m.impl("linear_dense", TORCH_BOX(&linear_dense));
}
