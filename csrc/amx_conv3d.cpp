// Convolutions as products of AMX tiles.
//
// Forward and the input's gradient: tile rows are 16 neighbouring positions of the result's row, the depth is (tap,
// channel). The kw taps of a channels-last row are adjacent in memory, so a position's left operand is, for each of the
// kt * kh rows that it meets, one contiguous window of kw * channels numbers, cut into steps of at most 32. Rows come
// from a scratch that has the zero borders and fits L2; its frames are a ring that consecutive outputs in time share.
//
// The weight's gradient: tile rows are output channels, columns are window numbers, the depth is positions. dy is
// transposed, and x's windows interleaved, into scratch of the same kind.
#include "amx_conv3d.h"

#include "amx.h"

#ifdef VMAE_AMX

#include <cstring>
#include <vector>

#include "parallel.h"

#include "amx_begin.h"

namespace vmae {
namespace {

constexpr int64_t kScratch = 768 << 10;  // bytes of one thread's scratch rows, beside weights in L2
constexpr int64_t kHeavy = 1 << 20;      // bytes of a weight that L2 does not keep beside that
constexpr int64_t kJobs = 16;            // wanted of the weight's gradient, for threads to share

// x / (1 + exp(-x)).
__m512 silu(__m512 x) {
  // min and max return their second operand where one is NaN; exp(104) is already infinite.
  __m512 y = _mm512_min_ps(_mm512_set1_ps(104.f), _mm512_sub_ps(_mm512_setzero_ps(), x));
  y = _mm512_max_ps(_mm512_set1_ps(-104.f), y);
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.f), exp_of(y)));
}

// ---- Forward and the input's gradient -------------------------------------------------------------------------------

// Time, height or width: tap j of result i is source position i * step + start + j and kernel index j * tap_step +
// tap_start; the result's position is i * result_step + result_start.
struct Axis {
  int64_t count, taps, step, start, tap_step, tap_start, result_step, result_start;
};

Axis forward_axis(int64_t results, int64_t kernel, int64_t stride, int64_t padding) {
  return {results, kernel, stride, -padding, 1, 0, 1, 0};
}

// The gradient at inputs first..inputs-1 that are `phase` modulo the stride, counted from the padding's edge: they meet
// every stride-th tap, in reverse, and for those it is a convolution of stride 1 over dy.
Axis gradient_axis(int64_t inputs, int64_t kernel, int64_t stride, int64_t padding, int64_t phase, int64_t first) {
  int64_t taps = phase < kernel ? ceil_div(kernel - phase, stride) : 0;
  int64_t skipped = ceil_div(std::max<int64_t>(first + padding - phase, 0), stride);
  int64_t last = inputs - 1 + padding - phase;
  int64_t count = last < 0 ? 0 : std::max<int64_t>(last / stride + 1 - skipped, 0);
  return {count, taps, 1, skipped - (taps - 1), -stride, phase + (taps - 1) * stride, stride,
          phase + skipped * stride - padding};
}

// A channels-last video in two parts, `head` (the cache: frames before frame 0; may be null) and `body`.
template <class T>
struct Video {
  T *body, *head;
  int64_t frames, head_frames, height, width, channels;

  T* frame(int64_t batch, int64_t t) const {  // null outside
    int64_t size = height * width * channels;
    if (t >= 0) return t < frames ? body + (batch * frames + t) * size : nullptr;
    return head && t >= -head_frames ? head + (batch * head_frames + head_frames + t) * size : nullptr;
  }
};

struct Convolution {
  Axis time, height, width;
  int64_t batch;
  Video<const uint16_t> source;
  Video<uint16_t> result;
  const uint16_t* weight;
  int64_t result_stride, source_stride, tap_strides[3];  // of the weight, in elements, by channel and tap
  const uint16_t* bias;
  bool silu;
};

// How a window, taps * channels, is cut into steps of equal depth. Both are even; channels are padded to `pitch`.
struct Window {
  int64_t pitch, depth, steps;
};

Window cut_window(int64_t channels, int64_t taps) {
  int64_t parts = ceil_div(channels, kDepth), depth = round_up(ceil_div(channels, parts), 2);
  Window best{parts * depth, depth, taps * parts};  // each tap by itself
  for (int64_t pitch = round_up(channels, 2); pitch < channels + kDepth; pitch += 2)
    for (int64_t steps = ceil_div(taps * pitch, kDepth); steps < best.steps; ++steps)
      if (taps * pitch % (2 * steps) == 0) best = {pitch, taps * pitch / steps, steps};
  return best;
}

// The weight as right tiles: [pair of 16 result channels][kt][kh][step][each of the pair][depth / 2][16][2].
Buffer<uint16_t> pack_weight(const Convolution& c, const Window& window) {
  int64_t tiles = ceil_div(c.result.channels, kColumns), size = window.depth * kColumns;
  int64_t taps = c.time.taps * c.height.taps;
  Buffer<uint16_t> packed = buffer<uint16_t>(tiles * taps * window.steps * size);
  bool contiguous = window.pitch == c.source.channels && c.source_stride == 1 && c.width.tap_step == 1;
  parallel(tiles, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      int64_t pair = tile / 2, width = std::min<int64_t>(2, tiles - pair * 2), columns = c.result.channels - tile * 16;
      uint16_t* to = packed.get() + pair * 2 * taps * window.steps * size + tile % 2 * size;
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t r = c.time.tap_start + tap / c.height.taps * c.time.tap_step;
        const int64_t u = c.height.tap_start + tap % c.height.taps * c.height.tap_step;
        const uint16_t* from =
            c.weight + tile * kColumns * c.result_stride + r * c.tap_strides[0] + u * c.tap_strides[1];
        for (int64_t first = 0; first < window.steps * window.depth; first += window.depth) {
          auto number = [&](int64_t k) -> const uint16_t* {  // null: padding
            int64_t v = k / window.pitch, channel = k % window.pitch;
            if (channel >= c.source.channels) return nullptr;
            return from + (c.width.tap_start + v * c.width.tap_step) * c.tap_strides[2] + channel * c.source_stride;
          };
          if (c.result_stride == 1) {
            for (int64_t k = 0; k < window.depth; k += 2) {
              const uint16_t *a = number(first + k), *b = number(first + k + 1);
              __m256i row0 = _mm256_maskz_loadu_epi16(a ? first16(columns) : 0, a);
              __m256i row1 = _mm256_maskz_loadu_epi16(b ? first16(columns) : 0, b);
              _mm512_storeu_si512(to + k * kColumns, interleave(row0, row1));
            }
          } else {
            __m512i rows[16];
            for (int64_t n = 0; n < kColumns; ++n) {
              if (contiguous) {
                rows[n] = _mm512_maskz_loadu_epi16(n < columns ? first32(window.depth) : 0,
                                                   from + n * c.result_stride + first);
              } else {
                alignas(64) uint16_t line[kDepth] = {};
                for (int64_t k = 0; k < window.depth && n < columns; ++k)
                  if (const uint16_t* x = number(first + k)) line[k] = x[n * c.result_stride];
                rows[n] = _mm512_load_si512(line);
              }
            }
            transpose(rows);
            for (int64_t k = 0; k < window.depth; k += 2) _mm512_storeu_si512(to + k * kColumns, rows[k / 2]);
          }
          to += width * size;
        }
      }
    }
  });
  return packed;
}

// Positions start, start + 1, ... of a row of `width` positions, zeros outside; each padded with zeros to `pitch`.
// row null: zeros.
void copy_row(uint16_t* to, int64_t count, int64_t pitch, const uint16_t* row, int64_t start, int64_t width,
              int64_t channels) {
  int64_t begin = std::clamp<int64_t>(-start, 0, count);
  int64_t end = row ? std::clamp<int64_t>(width - start, begin, count) : begin;
  std::memset(to, 0, begin * pitch * sizeof(*to));
  if (pitch == channels) {
    if (begin < end)
      std::memcpy(to + begin * pitch, row + (begin + start) * channels, (end - begin) * pitch * sizeof(*to));
  } else {
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(to + i * pitch, row + (i + start) * channels, channels * sizeof(*to));
      std::memset(to + i * pitch + channels, 0, (pitch - channels) * sizeof(*to));
    }
  }
  std::memset(to + end * pitch, 0, (count - end) * pitch * sizeof(*to));
}

// One position's sums of up to 32 channels, to bfloat16.
void write_position(const Convolution& c, const float* low, const float* high, int64_t channel, uint16_t* to) {
  __mmask32 mask = first32(c.result.channels - channel);
  __m512 sum0 = _mm512_loadu_ps(low), sum1 = high ? _mm512_loadu_ps(high) : _mm512_setzero_ps();
  if (c.bias) {
    __m512i bias = _mm512_maskz_loadu_epi16(mask, c.bias + channel);
    sum0 = _mm512_add_ps(sum0, to_float(_mm512_castsi512_si256(bias)));
    sum1 = _mm512_add_ps(sum1, to_float(_mm512_extracti64x4_epi64(bias, 1)));
  }
  if (c.silu) sum0 = silu(sum0), sum1 = silu(sum1);
  _mm512_mask_storeu_epi16(to + channel, mask, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(sum1, sum0)));
}

void convolve(const Convolution& c) {
  const int64_t channels = c.result.channels, tiles = ceil_div(channels, kColumns);
  const int64_t height = c.height.count, width = c.width.count, frames = c.time.count;
  if (height == 0 || width == 0 || frames == 0) return;
  const Window window = cut_window(c.source.channels, c.width.taps);
  const int64_t size = window.depth * kColumns;
  const Buffer<uint16_t> weight = pack_weight(c, window);

  // A row's positions are shared evenly among its tiles, whose cost is by the row; the last one may begin earlier.
  const int64_t across = ceil_div(width, kRows), rows = ceil_div(width, across);
  const int64_t positions = (width - 1) * c.width.step + c.width.taps, row_size = positions * window.pitch;
  // A unit of work is some rows of one frame, or of a group of frames where the weight, which every unit reads, is too
  // much for L2. Its scratch fits the budget, and there are enough of them.
  const bool heavy = tiles * c.time.taps * c.height.taps * window.steps * size * 2 > kHeavy;
  const int64_t wanted = (heavy ? 1 : 8) * threads();
  auto scratch_rows = [&](int64_t results) { return (results - 1) * c.height.step + c.height.taps; };
  auto scratch_frames = [&](int64_t results) { return (results - 1) * c.time.step + c.time.taps; };
  auto fits = [&](int64_t rows, int64_t frames) {
    return scratch_frames(frames) * scratch_rows(rows) * row_size * 2 <= kScratch;
  };
  int64_t block = height, parts = 1, group = 1;
  while (block > 2 && (!fits(block, 1) || c.batch * frames * ceil_div(height, block) < wanted))
    block = round_up(ceil_div(height, ++parts), 2);
  const int64_t blocks = ceil_div(height, block);
  while (heavy && fits(block, group + 1) && c.batch * blocks * ceil_div(frames, group + 1) >= wanted) ++group;
  const int64_t groups = ceil_div(frames, group);
  const int64_t ring = scratch_frames(group), frame_size = scratch_rows(block) * row_size;

  parallel(c.batch * blocks * groups, [&](int64_t first_unit, int64_t end_unit) {
    Tiles registers;
    registers.configure(rows, window.depth);
    Buffer<uint16_t> scratch = buffer<uint16_t>(ring * frame_size);
    int current = 0;
    std::vector<int64_t> held(ring);  // the ring's frames
    alignas(64) float sums[2][4 * kTile];
    // The last tile's sums are written while the next one's products run.
    struct {
      const float* sums;
      uint16_t* to;
      int64_t channel, columns, next, count;
    } pending{};
    auto write = [&](int64_t most) {
      for (; most > 0 && pending.next < pending.count; --most, ++pending.next) {
        const int64_t m = pending.next / rows, n = pending.next % rows;
        const float* sum = pending.sums + m * pending.columns * kTile + n * kColumns;
        write_position(c, sum, pending.columns > 1 ? sum + kTile : nullptr, pending.channel,
                       pending.to + (m * c.height.result_step * c.result.width + n * c.width.result_step) * channels);
      }
    };

    for (int64_t unit = first_unit; unit < end_unit; ++unit) {
      const int64_t first = unit % groups * group, last = std::min(first + group, frames) - 1;
      const int64_t first_row = unit / groups % blocks * block, batch = unit / groups / blocks;
      const int64_t results = std::min(block, height - first_row);
      auto start = [&](int64_t i) { return i * c.time.step + c.time.start; };
      auto slot = [&](int64_t t) { return (t % ring + ring) % ring; };
      if (unit == first_unit || first == 0) std::fill(held.begin(), held.end(), INT64_MIN);
      for (int64_t t = start(first); t < start(last) + c.time.taps; ++t) {
        const uint16_t* frame = c.source.frame(batch, t);
        if (!frame || held[slot(t)] == t) continue;
        held[slot(t)] = t;
        for (int64_t row = 0; row < scratch_rows(results); ++row) {
          int64_t h = first_row * c.height.step + c.height.start + row;
          bool inside = h >= 0 && h < c.source.height;
          copy_row(scratch.get() + slot(t) * frame_size + row * row_size, positions, window.pitch,
                   inside ? frame + h * c.source.width * c.source.channels : nullptr, c.width.start, c.source.width,
                   c.source.channels);
        }
      }
      fence();

      const int64_t share = ceil_div(2 * rows, std::max<int64_t>(c.time.taps * c.height.taps, 1));
      // M rows of the result's frame i x N tiles of channels.
      auto tile = [&]<int M, int N>(int64_t i, int64_t pair, int64_t row, int64_t column) {
        const uint16_t* right = weight.get() + pair * 2 * c.time.taps * c.height.taps * window.steps * size;
        const uint16_t* left = scratch.get() + row * c.height.step * row_size + column * c.width.step * window.pitch;
        const int64_t right_size = N * window.steps * size;
        zero_tiles<M, N>();
        for (int64_t r = 0; r < c.time.taps; ++r) {
          const int64_t t = start(i) + r;
          if (!c.source.frame(batch, t)) continue;
          for (int64_t u = 0; u < c.height.taps; ++u) {
            const uint16_t* left0 = left + slot(t) * frame_size + u * row_size;
            const uint16_t* right0 = right + (r * c.height.taps + u) * right_size;
            multiply<M, N>(left0, left0 + c.height.step * row_size, c.width.step * window.pitch * 2, window.depth,
                           right0, right0 + size, N * size, window.steps);
            write(share);
          }
        }
        write(2 * rows);
        current ^= 1;
        store_tiles<M, N>(sums[current], N * kTile, kTile);
        uint16_t* frame = c.result.frame(batch, i * c.time.result_step + c.time.result_start);
        int64_t h = (first_row + row) * c.height.result_step + c.height.result_start;
        int64_t w = column * c.width.result_step + c.width.result_start;
        pending = {sums[current], frame + (h * c.result.width + w) * channels, pair * 2 * kColumns, N, 0, M * rows};
      };
      for (int64_t pair = 0; pair * 2 < tiles; ++pair) {
        for (int64_t t = 0; t < across; ++t) {
          const int64_t column = std::min(t * rows, width - rows);
          for (int64_t i = first; i <= last; ++i) {
            for (int64_t row = 0; row < results; row += 2) {  // two rows: they share all but one of the rows they read
              bool two_rows = row + 1 < results, two_tiles = pair * 2 + 1 < tiles;
              if (two_rows && two_tiles) tile.template operator()<2, 2>(i, pair, row, column);
              else if (two_rows) tile.template operator()<2, 1>(i, pair, row, column);
              else if (two_tiles) tile.template operator()<1, 2>(i, pair, row, column);
              else tile.template operator()<1, 1>(i, pair, row, column);
            }
          }
        }
      }
    }
    write(2 * rows);
  });
}

// ---- The weight's gradient ------------------------------------------------------------------------------------------

// Pairs of positions, cut into steps of equal depth.
struct Cut {
  int64_t steps, pairs;  // pairs of one step
};

Cut cut_pairs(int64_t pairs) {
  int64_t steps = ceil_div(pairs, kDepth / 2);
  while (pairs % steps) ++steps;
  return {steps, pairs / steps};
}

// How many rows of the result are one sum between loading and storing the results' tiles: few steps, few loads, few
// rows of x that two blocks both need.
int64_t choose_rows(int64_t height, int64_t pairs, int64_t overlap, int64_t limit) {
  int64_t best = 1;
  double best_cost = 1e30;
  for (int64_t rows = 1; rows <= std::min(height, limit); ++rows) {
    int64_t rest = height % rows, blocks = ceil_div(height, rows);
    double steps = static_cast<double>(height / rows * cut_pairs(rows * pairs).steps);
    if (rest) steps += static_cast<double>(cut_pairs(rest * pairs).steps);
    double cost = steps * (1 + 0.1 * static_cast<double>(overlap) / static_cast<double>(rows)) + 1.5 * blocks;
    if (cost < best_cost) best = rows, best_cost = cost;
  }
  return best;
}

void sum_weight_gradient(const AmxConvolution& sizes, const Video<const uint16_t>& x, const Video<const uint16_t>& dy,
                         uint16_t* dweight) {
  const int64_t kt = sizes.kernel[0], kh = sizes.kernel[1], kw = sizes.kernel[2];
  const int64_t st = sizes.stride[0], sh = sizes.stride[1], sw = sizes.stride[2];
  const int64_t outputs = sizes.outputs, window = kw * sizes.channels, line = sizes.width * sizes.channels;
  const int64_t height = dy.height, width = dy.width, frames = dy.frames, pairs = ceil_div(width, 2);

  // A job is some tiles of output channels x some tiles of the window, for all kt * kh taps, over one segment of the
  // positions; a unit of its positions is some rows of one frame.
  const int64_t all_lefts = ceil_div(outputs, kRows), left_rows = ceil_div(outputs, all_lefts);
  const int64_t left_jobs = ceil_div(all_lefts, 4), lefts = ceil_div(all_lefts, left_jobs);
  const int64_t all_rights = ceil_div(window, kColumns), right_jobs = ceil_div(all_rights, 12);
  const int64_t rights = ceil_div(all_rights, right_jobs);
  const int64_t overlap = (kh - 1) / sh, line_size = pairs * 2 * kColumns;  // of one row in one right tile's columns
  const int64_t limit = std::min(kScratch / (kt * sh * rights * line_size * 2) - overlap, 1024 / (pairs * 2));
  const int64_t block = choose_rows(height, pairs, overlap, std::max<int64_t>(limit, 1));
  const int64_t blocks = ceil_div(height, block), units = sizes.batch * blocks * frames;
  const int64_t phase_size = (block + overlap) * line_size, right_size = sh * phase_size;
  const int64_t frame_size = rights * right_size;
  const int64_t jobs = left_jobs * right_jobs;
  const int64_t segments = std::clamp<int64_t>(ceil_div(kJobs, jobs), 1, units);
  const int64_t tiles = kt * kh * rights * lefts;  // of a job's sums
  Buffer<float> partial = buffer<float>(segments > 1 ? segments * outputs * kt * kh * window : 0);

  parallel(jobs * segments, [&](int64_t first_job, int64_t end_job) {
    Tiles registers;
    Buffer<uint16_t> x_scratch = buffer<uint16_t>(kt * frame_size);  // [ring][right][row mod sh][row / sh][pair][16][2]
    Buffer<uint16_t> dy_scratch = buffer<uint16_t>((block * pairs + kDepth) * lefts * left_rows * kDepth);
    Buffer<float> sums = buffer<float>(tiles * kTile);  // [kt][kh][right][left][16][16]
    std::vector<int64_t> held(kt);

    for (int64_t job = first_job; job < end_job; ++job) {
      const int64_t segment = job % segments, part = job / segments;
      const int64_t first_left = part % left_jobs * lefts, first_right = part / left_jobs * rights;
      const int64_t m = std::min(lefts, all_lefts - first_left), n = std::min(rights, all_rights - first_right);
      const int64_t first_unit = units * segment / segments, end_unit = units * (segment + 1) / segments;
      std::memset(sums.get(), 0, tiles * kTile * sizeof(float));

      for (int64_t unit = first_unit; unit < end_unit; ++unit) {
        const int64_t z = unit % frames, first_row = unit / frames % blocks * block, batch = unit / frames / blocks;
        const int64_t rows = std::min(block, height - first_row);
        const Cut cut = cut_pairs(rows * pairs);
        const int64_t left_size = left_rows * kDepth, start = z * st - (kt - st);
        auto slot = [&](int64_t r) { return ((start + r) % kt + kt) % kt; };
        if (unit == first_unit || z == 0) std::fill(held.begin(), held.end(), INT64_MIN);

        // dy as left tiles, [step][left][left_rows][32].
        const uint16_t* dy_rows = dy.frame(batch, z) + first_row * width * outputs;
        const uint16_t* position = dy_rows;  // the first of the next pair's
        for (int64_t s = 0, q = 0; s < cut.steps; ++s) {
          const uint16_t* at[kDepth / 2];
          bool both[kDepth / 2];  // positions of the pair are in the row
          for (int64_t i = 0; i < cut.pairs; ++i) {
            at[i] = position, both[i] = q + 1 < width;
            position += both[i] ? 2 * outputs : outputs;
            q = q + 2 < width ? q + 2 : 0;
          }
          for (int64_t left = 0; left < m; ++left) {
            const int64_t channel = (first_left + left) * left_rows;
            const __mmask16 mask = first16(std::min(left_rows, outputs - channel));
            __m512i t[16];
            for (int64_t i = 0; i < 16; ++i) {
              if (i < cut.pairs)
                t[i] = interleave(_mm256_maskz_loadu_epi16(mask, at[i] + channel),
                                  _mm256_maskz_loadu_epi16(both[i] ? mask : 0, at[i] + channel + outputs));
              else
                t[i] = _mm512_setzero_si512();
            }
            transpose(t);
            uint16_t* to = dy_scratch.get() + (s * m + left) * left_size;
            for (int64_t i = 0; i < left_rows; ++i) _mm512_store_si512(to + i * kDepth, t[i]);
          }
        }

        for (int64_t r = 0; r < kt; ++r) {  // x as right tiles
          const uint16_t* frame = x.frame(batch, start + r);
          if (!frame || held[slot(r)] == start + r) continue;
          held[slot(r)] = start + r;
          for (int64_t row = 0; row < (rows - 1) * sh + kh; ++row) {
            const int64_t h = first_row * sh - kh / 2 + row;
            uint16_t* to = x_scratch.get() + slot(r) * frame_size + row % sh * phase_size + row / sh * line_size;
            // Numbers at, ..., at + 15 of the image's row; zeros outside.
            auto numbers = [&](int64_t at, bool inside) {
              __mmask16 mask = static_cast<__mmask16>(first16(line - at) & ~first16(-at));
              return _mm256_maskz_loadu_epi16(inside ? mask : 0, frame + h * line + at);
            };
            const bool inside = h >= 0 && h < sizes.height;
            const int64_t next = sw * sizes.channels;
            for (int64_t q = 0; q < width; q += 2, to += 2 * kColumns) {
              const int64_t at = (q * sw - kw / 2) * sizes.channels + first_right * kColumns;
              if (inside && q + 1 < width && at >= 0 && at + next + n * kColumns <= line) {
                for (int64_t j = 0; j < n; ++j) {
                  const uint16_t* from = frame + h * line + at + j * kColumns;
                  _mm512_store_si512(to + j * right_size, interleave(load16(from), load16(from + next)));
                }
              } else {
                for (int64_t j = 0; j < n; ++j)
                  _mm512_store_si512(to + j * right_size,
                                     interleave(numbers(at + j * kColumns, inside),
                                                numbers(at + j * kColumns + next, inside && q + 1 < width)));
              }
            }
          }
        }
        fence();

        registers.configure(left_rows, cut.pairs * 2);
        auto tile = [&]<int M, int N>(float* sum, const uint16_t* left, const uint16_t* right) {
          load_tiles<M, N>(sum, kTile, lefts * kTile);
          multiply<M, N>(left, left + left_size, kDepth * 2, m * left_size, right, right + right_size,
                         cut.pairs * 2 * kColumns, cut.steps);
          store_tiles<M, N>(sum, kTile, lefts * kTile);
        };
        for (int64_t r = 0; r < kt; ++r) {
          if (!x.frame(batch, start + r)) continue;
          for (int64_t u = 0; u < kh; ++u) {
            for (int64_t j = 0; j < n; j += 2) {
              const uint16_t* right = x_scratch.get() + slot(r) * frame_size + j * right_size + u % sh * phase_size +
                                      u / sh * line_size;
              for (int64_t i = 0; i < m; i += 2) {
                float* sum = sums.get() + (((r * kh + u) * rights + j) * lefts + i) * kTile;
                const uint16_t* left = dy_scratch.get() + i * left_size;
                if (i + 1 < m && j + 1 < n) tile.template operator()<2, 2>(sum, left, right);
                else if (i + 1 < m) tile.template operator()<2, 1>(sum, left, right);
                else if (j + 1 < n) tile.template operator()<1, 2>(sum, left, right);
                else tile.template operator()<1, 1>(sum, left, right);
              }
            }
          }
        }
      }

      for (int64_t tap = 0; tap < kt * kh; ++tap) {
        for (int64_t i = 0; i < m * left_rows; ++i) {
          const int64_t output = first_left * left_rows + i;
          if (output >= outputs) break;
          for (int64_t j = 0; j < n; ++j) {
            const int64_t column = (first_right + j) * kColumns, at = (output * kt * kh + tap) * window + column;
            __m512 sum = _mm512_loadu_ps(sums.get() + ((tap * rights + j) * lefts + i / left_rows) * kTile +
                                         i % left_rows * kColumns);
            __mmask16 mask = first16(window - column);
            if (segments > 1)
              _mm512_mask_storeu_ps(partial.get() + segment * outputs * kt * kh * window + at, mask, sum);
            else
              _mm256_mask_storeu_epi16(dweight + at, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum)));
          }
        }
      }
    }
  });

  if (segments == 1) return;
  const int64_t total = outputs * kt * kh * window;
  parallel(ceil_div(total, kTile), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin * kTile; at < std::min(end * kTile, total); at += 16) {
      __mmask16 mask = first16(total - at);
      __m512 sum = _mm512_setzero_ps();
      for (int64_t s = 0; s < segments; ++s)
        sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, partial.get() + s * total + at));
      _mm256_mask_storeu_epi16(dweight + at, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(sum)));
    }
  });
}

}  // namespace

void amx_forward(const AmxConvolution& s, const uint16_t* x, const uint16_t* cache, const uint16_t* weight,
                 const uint16_t* bias, bool silu, uint16_t* y) {
  const int64_t kh = s.kernel[1], kw = s.kernel[2];
  Convolution c{};
  c.time = forward_axis(s.output_frames(), s.kernel[0], s.stride[0], s.cache_frames());
  c.height = forward_axis(s.output_height(), kh, s.stride[1], kh / 2);
  c.width = forward_axis(s.output_width(), kw, s.stride[2], kw / 2);
  c.batch = s.batch;
  c.source = {x, cache, s.frames, s.cache_frames(), s.height, s.width, s.channels};
  c.result = {y, nullptr, s.output_frames(), 0, s.output_height(), s.output_width(), s.outputs};
  c.weight = weight, c.bias = bias, c.silu = silu;
  c.result_stride = s.kernel[0] * kh * kw * s.channels, c.source_stride = 1;
  c.tap_strides[0] = kh * kw * s.channels, c.tap_strides[1] = kw * s.channels, c.tap_strides[2] = s.channels;
  convolve(c);
}

void amx_input_gradient(const AmxConvolution& s, const uint16_t* dy, const uint16_t* weight, uint16_t* dx,
                        uint16_t* dcache) {
  const int64_t kh = s.kernel[1], kw = s.kernel[2], past = s.cache_frames();
  Convolution c{};
  c.batch = s.batch;
  c.source = {dy, nullptr, s.output_frames(), 0, s.output_height(), s.output_width(), s.outputs};
  c.result = {dx, dcache, s.frames, past, s.height, s.width, s.channels};
  c.weight = weight;
  c.result_stride = 1, c.source_stride = s.kernel[0] * kh * kw * s.channels;
  c.tap_strides[0] = kh * kw * s.channels, c.tap_strides[1] = kw * s.channels, c.tap_strides[2] = s.channels;
  for (int64_t t = 0; t < s.stride[0]; ++t)
    for (int64_t h = 0; h < s.stride[1]; ++h)
      for (int64_t w = 0; w < s.stride[2]; ++w) {
        c.time = gradient_axis(s.frames, s.kernel[0], s.stride[0], past, t, dcache ? -past : 0);
        c.height = gradient_axis(s.height, kh, s.stride[1], kh / 2, h, 0);
        c.width = gradient_axis(s.width, kw, s.stride[2], kw / 2, w, 0);
        convolve(c);
      }
}

void amx_weight_gradient(const AmxConvolution& s, const uint16_t* x, const uint16_t* cache, const uint16_t* dy,
                         uint16_t* dweight) {
  sum_weight_gradient(s, {x, cache, s.frames, s.cache_frames(), s.height, s.width, s.channels},
                      {dy, nullptr, s.output_frames(), 0, s.output_height(), s.output_width(), s.outputs}, dweight);
}

}  // namespace vmae

#include "amx_end.h"

namespace vmae {

bool amx_supported(const AmxConvolution& s) {
  for (int i = 0; i < 3; ++i)
    if (s.kernel[i] < 1 || s.kernel[i] > 7 || s.stride[i] < 1 || s.stride[i] > 4) return false;
  return s.batch > 0 && s.channels > 0 && s.outputs > 0 && s.frames > 0 && s.frames % s.stride[0] == 0 &&
         s.kernel[0] >= s.stride[0] && s.height + 2 * (s.kernel[1] / 2) >= s.kernel[1] &&
         s.width + 2 * (s.kernel[2] / 2) >= s.kernel[2] && s.height > 0 && s.width > 0;
}

}  // namespace vmae

#else

namespace vmae {

bool amx_supported(const AmxConvolution&) { return false; }
void amx_forward(const AmxConvolution&, const uint16_t*, const uint16_t*, const uint16_t*, const uint16_t*, bool,
                 uint16_t*) {}
void amx_input_gradient(const AmxConvolution&, const uint16_t*, const uint16_t*, uint16_t*, uint16_t*) {}
void amx_weight_gradient(const AmxConvolution&, const uint16_t*, const uint16_t*, const uint16_t*, uint16_t*) {}

}  // namespace vmae

#endif
