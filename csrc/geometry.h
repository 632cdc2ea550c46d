// Where the implicit GEMM finds its operands: the arithmetic of tiles, taps and borders, for the GPU and, in the tests,
// for the host, which has no GPU to run the kernels on.
//
// Tensors are channels-last: [batch, frames, rows, columns, channels]. A video may come in two parts, `head` (frames
// before frame 0: the cache) and `body`. The GEMM's rows are positions of the result, its depth is (tap, channel) with
// the channel fastest, and nothing here depends on the number of frames or clips but the count of rows.
#pragma once

#include <cstdint>
#include <vector>

#if defined(__CUDACC__)
#define VMAE_HD __host__ __device__ __forceinline__
#else
#define VMAE_HD inline
#endif

namespace vmae {

constexpr int kThreads = 256;

// Time, height or width. Through its tap j, row i meets source position i * step + start + j * direction and weight
// j * tap_step + tap_start, and it is position i * result_step + result_start of the result.
struct Axis {
  int rows, taps, source;
  int step, start, direction;
  int tap_step, tap_start;
  int result_step, result_start;
};

// The convolution itself: output i reads input i * stride - padding + j.
inline Axis forward_axis(int inputs, int outputs, int kernel, int stride, int padding) {
  return {outputs, kernel, inputs, stride, -padding, 1, 1, 0, 1, 0};
}

// The gradient of inputs first..inputs-1 that are `phase` modulo the stride, counted from the padding's edge: they meet
// every stride-th tap alone, and for those it is a convolution of stride 1 over the gradient of the outputs. `first` is
// -padding where the padding's gradient is wanted too (the cache's), else 0.
inline Axis gradient_axis(int inputs, int outputs, int kernel, int stride, int padding, int phase, int first) {
  int taps = (kernel - phase + stride - 1) / stride;  // none beyond the kernel
  int skipped = first + padding > phase ? (first + padding - phase + stride - 1) / stride : 0;
  int last = inputs - 1 + padding - phase;
  int rows = last < 0 ? 0 : last / stride + 1 - skipped;
  return {rows > 0 ? rows : 0, taps, outputs, 1, skipped, -1, stride, phase, stride, phase + skipped * stride - padding};
}

// One launch's gather: what the kernels get, by value.
struct Gather {
  Axis time, height, width;
  int64_t batch;
  int channels;                // of the source: the depth of one tap
  int columns;                 // the GEMM's columns: channels of the result
  int source_head;             // frames of the source's head
  int result_head;             // frames of the result's head
  int result_time, result_height, result_width;  // extents of the result's body
  int kernel_time, kernel_height, kernel_width;  // of the weight, [columns, time, height, width, channels]

  // Weights of one column.
  VMAE_HD int column_length() const { return kernel_time * kernel_height * kernel_width * channels; }
  VMAE_HD int64_t rows() const { return batch * time.rows * height.rows * width.rows; }
  VMAE_HD int taps() const { return time.taps * height.taps * width.taps; }
};

// A causal convolution: kernel[0] - stride[0] frames before the clip, none after; half a kernel around each frame.
struct Problem {
  int64_t batch;
  int channels, outputs;
  int frames, height, width;
  int kernel[3], stride[3];

  int past() const { return kernel[0] - stride[0]; }
  int padding(int axis) const { return axis == 0 ? past() : kernel[axis] / 2; }
  int inputs(int axis) const { return axis == 0 ? frames : axis == 1 ? height : width; }
  int results(int axis) const {
    if (axis == 0) return frames / stride[0];
    return (inputs(axis) + 2 * padding(axis) - kernel[axis]) / stride[axis] + 1;
  }
};

inline Gather forward_gather(const Problem& p) {
  Axis axes[3];
  for (int i = 0; i < 3; ++i) axes[i] = forward_axis(p.inputs(i), p.results(i), p.kernel[i], p.stride[i], p.padding(i));
  return {axes[0], axes[1], axes[2], p.batch, p.channels, p.outputs, p.past(), 0,
          p.results(0), p.results(1), p.results(2), p.kernel[0], p.kernel[1], p.kernel[2]};
}

// One gather for each class of inputs that has some; `with_past` includes the frames before the clip.
inline std::vector<Gather> gradient_gathers(const Problem& p, bool with_past) {
  std::vector<Gather> gathers;
  for (int t = 0; t < p.stride[0]; ++t) {
    for (int h = 0; h < p.stride[1]; ++h) {
      for (int w = 0; w < p.stride[2]; ++w) {
        int phase[3] = {t, h, w};
        Axis axes[3];
        for (int i = 0; i < 3; ++i) {
          int first = i == 0 && with_past ? -p.past() : 0;
          axes[i] = gradient_axis(p.inputs(i), p.results(i), p.kernel[i], p.stride[i], p.padding(i), phase[i], first);
        }
        Gather g = {axes[0], axes[1], axes[2], p.batch, p.outputs, p.channels, 0, p.past(),
                    p.frames, p.height, p.width, p.kernel[0], p.kernel[1], p.kernel[2]};
        if (g.rows() > 0) gathers.push_back(g);
      }
    }
  }
  return gathers;
}

struct Position {
  int batch, time, height, width;
};

VMAE_HD Position position(const Gather& g, int64_t row) {
  Position at;
  at.width = static_cast<int>(row % g.width.rows);
  row /= g.width.rows;
  at.height = static_cast<int>(row % g.height.rows);
  row /= g.height.rows;
  at.time = static_cast<int>(row % g.time.rows);
  at.batch = static_cast<int>(row / g.time.rows);
  return at;
}

// Goes `rows` further. A loop of a few turns takes less time than divisions.
VMAE_HD void advance(const Gather& g, Position& at, int rows) {
  at.width += rows;
  while (at.width >= g.width.rows) {
    at.width -= g.width.rows;
    if (++at.height == g.height.rows) {
      at.height = 0;
      if (++at.time == g.time.rows) {
        at.time = 0;
        ++at.batch;
      }
    }
  }
}

// The place of a position in a video of head and body; null where there is none, or outside it. Both parts have
// `height` x `width` places of `channels` elements a frame.
template <class T>
VMAE_HD T* place(T* body, T* head, int head_frames, int batch, int time, int row, int column, int frames,
                 int height, int width, int channels) {
  bool before = time < 0;
  int count = before ? head_frames : frames;
  int frame = before ? time + head_frames : time;
  T* part = before ? head : body;
  bool inside = part != nullptr && frame >= 0 && frame < count && row >= 0 && row < height && column >= 0 && column < width;
  int64_t offset = (((static_cast<int64_t>(batch) * count + frame) * height + row) * width + column) * channels;
  return inside ? part + offset : nullptr;
}

template <class T>
VMAE_HD T* source_place(const Gather& g, T* body, T* head, const Position& row, int tap_time, int tap_height,
                        int tap_width) {
  return place(body, head, g.source_head, row.batch, row.time * g.time.step + g.time.start + tap_time * g.time.direction,
               row.height * g.height.step + g.height.start + tap_height * g.height.direction,
               row.width * g.width.step + g.width.start + tap_width * g.width.direction, g.time.source, g.height.source,
               g.width.source, g.channels);
}

template <class T>
VMAE_HD T* result_place(const Gather& g, T* body, T* head, const Position& row) {
  return place(body, head, g.result_head, row.batch, row.time * g.time.result_step + g.time.result_start,
               row.height * g.height.result_step + g.height.result_start,
               row.width * g.width.result_step + g.width.result_start, g.result_time, g.result_height, g.result_width,
               g.columns);
}

// A position in the GEMM's depth. `time` passes the last tap's at the end.
struct Tap {
  int time, height, width, channel;

  VMAE_HD bool inside(const Gather& g) const { return time < g.time.taps && g.height.taps > 0 && g.width.taps > 0; }

  // Goes `depth` further; true where it came to another tap.
  VMAE_HD bool advance(const Gather& g, int depth) {
    channel += depth;
    if (channel < g.channels) return false;
    do {
      channel -= g.channels;
      if (++width >= g.width.taps) {
        width = 0;
        if (++height >= g.height.taps) {
          height = 0;
          ++time;
        }
      }
    } while (channel >= g.channels);
    return true;
  }

  // Its place in the weights of one column.
  VMAE_HD int weight(const Gather& g) const {
    int t = time * g.time.tap_step + g.time.tap_start;
    int h = height * g.height.tap_step + g.height.tap_start;
    int w = width * g.width.tap_step + g.width.tap_start;
    return ((t * g.kernel_height + h) * g.kernel_width + w) * g.channels + channel;
  }
};

// How the threads of a block share the copying of a tile of LINES lines of LENGTH elements, VECTOR at a time.
template <int LINES, int LENGTH, int VECTOR>
struct Share {
  static constexpr int kAcross = LENGTH / VECTOR;
  static constexpr int kLinesAtOnce = kThreads / kAcross;
  static constexpr int kLines = LINES / kLinesAtOnce;  // of each thread
  static_assert(LENGTH % VECTOR == 0 && kThreads % kAcross == 0 && LINES % kLinesAtOnce == 0);

  VMAE_HD static int line(int thread, int i) { return thread / kAcross + i * kLinesAtOnce; }
  VMAE_HD static int element(int thread) { return thread % kAcross * VECTOR; }
};

// A thread's part of the tiles of the convolution's operands: ROWS x DEPTH of the source, COLUMNS x DEPTH of the weight.
// Its rows and columns stay, its taps and channels advance with the depth.
template <class T, int ROWS, int COLUMNS, int DEPTH, int VECTOR>
struct ConvolutionOperands {
  using RowShare = Share<ROWS, DEPTH, VECTOR>;
  using ColumnShare = Share<COLUMNS, DEPTH, VECTOR>;

  const T* body;
  const T* head;
  const T* weight;  // of the thread's first column
  int column;
  Position rows[RowShare::kLines];
  const T* places[RowShare::kLines];  // of the current tap's channel 0
  unsigned inside;                    // a bit for each row
  Tap tap;

  VMAE_HD ConvolutionOperands(const Gather& g, const T* body, const T* head, const T* weight, int64_t first_row,
                              int first_column, int thread)
      : body(body), head(head), column(first_column + ColumnShare::line(thread, 0)), inside(0), tap{0, 0, 0, 0} {
    this->weight = weight + static_cast<int64_t>(column) * g.column_length();
    for (int i = 0; i < RowShare::kLines; ++i) {
      int64_t row = first_row + RowShare::line(thread, i);
      if (row < g.rows()) inside |= 1u << i;
      rows[i] = position(g, row < g.rows() ? row : 0);
    }
    tap.advance(g, RowShare::element(thread));
    meet(g);
  }

  VMAE_HD void meet(const Gather& g) {
    for (int i = 0; i < RowShare::kLines; ++i) {
      bool there = (inside >> i & 1) && tap.inside(g);
      places[i] = there ? source_place(g, body, head, rows[i], tap.time, tap.height, tap.width) : nullptr;
    }
  }

  VMAE_HD void advance(const Gather& g) {
    if (tap.advance(g, DEPTH)) meet(g);
  }

  VMAE_HD const T* source(int i) const { return places[i] ? places[i] + tap.channel : nullptr; }

  VMAE_HD const T* weights(const Gather& g, int i) const {
    bool there = tap.inside(g) && column + i * ColumnShare::kLinesAtOnce < g.columns;
    int64_t skipped = static_cast<int64_t>(i) * ColumnShare::kLinesAtOnce * g.column_length();
    return there ? weight + skipped + tap.weight(g) : nullptr;
  }
};

// A thread's part of the tiles of the weight gradient's operands: DEPTH positions of the output, of which ROWS channels
// of the output's gradient and COLUMNS (tap, channel) of the source. Its channels and tap stay, its positions advance.
// `g` is the forward gather; its columns are the output's channels.
template <class T, int ROWS, int COLUMNS, int DEPTH, int VECTOR>
struct WeightGradientOperands {
  using RowShare = Share<DEPTH, ROWS, VECTOR>;
  using ColumnShare = Share<DEPTH, COLUMNS, VECTOR>;

  const T* body;
  const T* head;
  const T* gradient;  // at this tile's first position and the thread's first channel of the output
  int left;           // positions from there to the slice's end
  bool channels;      // whether the output has that channel
  Tap tap;            // the thread's tap and first channel of the source
  Position positions[ColumnShare::kLines];

  VMAE_HD WeightGradientOperands(const Gather& g, const T* body, const T* head, const T* gradient, int64_t first,
                                 int64_t last, int first_row, int first_column, int thread)
      : body(body), head(head), gradient(gradient + first * g.columns + first_row + RowShare::element(thread)),
        left(static_cast<int>(last - first)), channels(first_row + RowShare::element(thread) < g.columns), tap{0, 0, 0, 0} {
    tap.advance(g, first_column + ColumnShare::element(thread));
    for (int i = 0; i < ColumnShare::kLines; ++i) positions[i] = position(g, first + ColumnShare::line(thread, i));
  }

  VMAE_HD void advance(const Gather& g) {
    gradient += static_cast<int64_t>(DEPTH) * g.columns;
    left -= DEPTH;
    for (int i = 0; i < ColumnShare::kLines; ++i) vmae::advance(g, positions[i], DEPTH);
  }

  VMAE_HD const T* gradients(const Gather& g, int thread, int i) const {
    int line = RowShare::line(thread, i);
    return line < left && channels ? gradient + static_cast<int64_t>(line) * g.columns : nullptr;
  }

  VMAE_HD const T* source(const Gather& g, int thread, int i) const {
    if (ColumnShare::line(thread, i) >= left || !tap.inside(g)) return nullptr;
    const T* there = source_place(g, body, head, positions[i], tap.time, tap.height, tap.width);
    return there ? there + tap.channel : nullptr;
  }
};

}  // namespace vmae
