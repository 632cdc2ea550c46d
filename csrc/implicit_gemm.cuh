// The convolution and its gradients as implicit GEMMs for compute capability 8.0 and all that came after it: operands
// come to shared memory by asynchronous copies of 16 bytes (or element by element where channels or addresses do not
// allow that), with zeros for what lies outside, and go through the tensor cores with fp32 sums. On 9.0 those are asked
// through wgmma. Its copies are the same: the copy engine's descriptor holds one tensor, and here cache and chunk are
// read as one.
#pragma once

#include <cuda_runtime.h>

#include <cute/tensor.hpp>
#include <cute/atom/copy_atom.hpp>
#include <cute/atom/mma_atom.hpp>

#include "tiles.h"

namespace vmae {

using cute::_1;
using cute::_16;
using cute::_2;
using cute::_32;
using cute::_4;
using cute::_64;
using cute::_8;
using cute::Int;
using cute::Layout;
using cute::Shape;
using cute::Stride;

// How numbers are multiplied: what is stored, the instruction, how threads or warps tile it, and the copies from shared
// memory to registers, of operands whose depth is contiguous or whose rows are.
struct Bfloat16 {
  static constexpr int kBlocks = 2;
  using Element = cute::bfloat16_t;
  using Operand = cute::bfloat16_t;
  using Mma = decltype(cute::make_tiled_mma(cute::SM80_16x8x16_F32BF16BF16F32_TN{}, Layout<Shape<_2, _4, _1>>{},
                                            cute::Tile<_32, _64, _16>{}));
  using CopyDepth = cute::Copy_Atom<cute::SM75_U32x4_LDSM_N, Element>;
  using CopyRows = cute::Copy_Atom<cute::SM75_U16x8_LDSM_T, Element>;
};

struct Float16 {
  static constexpr int kBlocks = 2;
  using Element = cute::half_t;
  using Operand = cute::half_t;
  using Mma = decltype(cute::make_tiled_mma(cute::SM80_16x8x16_F32F16F16F32_TN{}, Layout<Shape<_2, _4, _1>>{},
                                            cute::Tile<_32, _64, _16>{}));
  using CopyDepth = cute::Copy_Atom<cute::SM75_U32x4_LDSM_N, Element>;
  using CopyRows = cute::Copy_Atom<cute::SM75_U16x8_LDSM_T, Element>;
};

struct TensorFloat32 {
  static constexpr int kBlocks = 1;  // with two, some registers would spill
  using Element = float;
  using Operand = cute::tfloat32_t;
  using Mma = decltype(cute::make_tiled_mma(cute::SM80_16x8x8_F32TF32TF32F32_TN{}, Layout<Shape<_2, _4, _1>>{}));
  using CopyDepth = cute::Copy_Atom<cute::UniversalCopy<Operand>, Operand>;
  using CopyRows = CopyDepth;
};

struct ExactFloat32 {
  static constexpr int kBlocks = 1;
  using Element = float;
  using Operand = float;
  using Mma = decltype(cute::make_tiled_mma(cute::UniversalFMA<float, float, float>{}, Layout<Shape<_16, _16, _1>>{}));
  using CopyDepth = cute::Copy_Atom<cute::UniversalCopy<float>, float>;
  using CopyRows = CopyDepth;
};

// A tile's layout in shared memory: swizzled within 8 lines of `LENGTH` elements, so that neither the copies in nor the
// matrix loads meet in one bank; chunks of 16 bytes stay whole.
template <class Element, int LENGTH>
struct Swizzled {
  static constexpr int kBase = sizeof(Element) == 2 ? 3 : 2;
  static constexpr int kLine = LENGTH * sizeof(Element) >= 128 ? 128 / sizeof(Element) : 64 / sizeof(Element);
  static constexpr int kBits = kLine * sizeof(Element) == 128 ? 3 : 2;
  using Lines = decltype(cute::composition(cute::Swizzle<kBits, kBase, 3>{},
                                           Layout<Shape<_8, Int<kLine>>, Stride<Int<kLine>, _1>>{}));
  using Columns = decltype(cute::composition(cute::Swizzle<kBits, kBase, 3>{},
                                             Layout<Shape<Int<kLine>, _8>, Stride<_1, Int<kLine>>>{}));
};

// [LINES, DEPTH, STAGES], with the depth contiguous or the lines.
template <class Element, int LINES, int DEPTH, int STAGES, bool DEPTH_CONTIGUOUS>
struct SharedTile {
  using Atom = std::conditional_t<DEPTH_CONTIGUOUS, typename Swizzled<Element, DEPTH>::Lines,
                                  typename Swizzled<Element, LINES>::Columns>;
  using Type = decltype(cute::tile_to_shape(Atom{}, Shape<Int<LINES>, Int<DEPTH>, Int<STAGES>>{}));
};

// VECTOR elements to shared memory; zeros where `from` is null.
template <int VECTOR, class Element>
__device__ __forceinline__ void copy_in(Element* to, const Element* from) {
  if constexpr (VECTOR * sizeof(Element) == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(cute::cast_smem_ptr_to_uint(to)), "l"(from),
                 "r"(from ? 16 : 0));
  } else {
    static_assert(VECTOR == 1);
    *to = from ? *from : Element(0);
  }
}

// A thread's share of a tile; `from(i)` is where its i-th line's elements come from. The lines are the tile's where its
// depth is contiguous, else they are the depth.
template <class Share, int VECTOR, bool DEPTH_CONTIGUOUS, class Tensor, class From>
__device__ __forceinline__ void copy_tile(Tensor& tile, int stage, From&& from) {
  CUTE_UNROLL
  for (int i = 0; i < Share::kLines; ++i) {
    int line = Share::line(threadIdx.x, i), element = Share::element(threadIdx.x);
    copy_in<VECTOR>(DEPTH_CONTIGUOUS ? &tile(line, element, stage) : &tile(element, line, stage), from(i));
  }
}

template <class Math, class Fragment>
__device__ __forceinline__ void round_operand(Fragment& fragment) {
  if constexpr (std::is_same_v<Math, TensorFloat32>) {  // to nearest: the tensor cores alone would cut the bits off
    CUTE_UNROLL
    for (int i = 0; i < cute::size(fragment); ++i) {
      uint32_t bits = cute::recast<uint32_t>(fragment)(i);
      asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(__uint_as_float(bits)));
      cute::recast<uint32_t>(fragment)(i) = bits;
    }
  }
}

// The pipeline: `load(stage)` starts the copies of the next tile's operands, in order; their products are summed.
template <class Math, class Tile, bool DEPTH_CONTIGUOUS>
struct Mainloop {
  using Element = typename Math::Element;
  using Operand = typename Math::Operand;
  using Mma = typename Math::Mma;
  using LayoutA = typename SharedTile<Element, Tile::kRows, Tile::kDepth, Tile::kStages, DEPTH_CONTIGUOUS>::Type;
  using LayoutB = typename SharedTile<Element, Tile::kColumns, Tile::kDepth, Tile::kStages, DEPTH_CONTIGUOUS>::Type;
  static constexpr int kSharedBytes = (cute::cosize_v<LayoutA> + cute::cosize_v<LayoutB>) * sizeof(Element);

  template <class Load, class Sums>
  static __device__ __forceinline__ void run(Element* shared, int tiles, Load&& load, Sums& sums) {
    using namespace cute;
    Element* shared_b = shared + cosize_v<LayoutA>;
    Tensor a = make_tensor(make_smem_ptr(reinterpret_cast<Operand*>(shared)), LayoutA{});
    Tensor b = make_tensor(make_smem_ptr(reinterpret_cast<Operand*>(shared_b)), LayoutB{});
    Mma mma;
    auto mine = mma.get_slice(threadIdx.x);
    Tensor ra = mine.partition_fragment_A(a(_, _, 0));
    Tensor rb = mine.partition_fragment_B(b(_, _, 0));
    using Copy = std::conditional_t<DEPTH_CONTIGUOUS, typename Math::CopyDepth, typename Math::CopyRows>;
    auto copy_a = make_tiled_copy_A(Copy{}, mma).get_slice(threadIdx.x);
    auto copy_b = make_tiled_copy_B(Copy{}, mma).get_slice(threadIdx.x);
    Tensor from_a = copy_a.partition_S(a);
    Tensor from_b = copy_b.partition_S(b);
    Tensor to_a = copy_a.retile_D(ra);
    Tensor to_b = copy_b.retile_D(rb);

    for (int stage = 0; stage < Tile::kStages - 1; ++stage) {
      if (stage < tiles) load(stage);
      cp_async_fence();
    }
    for (int tile = 0; tile < tiles; ++tile) {
      cp_async_wait<Tile::kStages - 2>();
      __syncthreads();
      // The stage that was read last, by all: this barrier came after that.
      if (tile + Tile::kStages - 1 < tiles) load((tile + Tile::kStages - 1) % Tile::kStages);
      cp_async_fence();
      int stage = tile % Tile::kStages;
      CUTE_UNROLL
      for (int k = 0; k < size<2>(ra); ++k) {
        copy(Copy{}, from_a(_, _, k, stage), to_a(_, _, k));
        copy(Copy{}, from_b(_, _, k, stage), to_b(_, _, k));
        auto fa = ra(_, _, k);
        auto fb = rb(_, _, k);
        round_operand<Math>(fa);
        round_operand<Math>(fb);
        gemm(mma, fa, fb, sums);
      }
    }
    cp_async_wait<0>();
    __syncthreads();
  }
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define VMAE_HAS_WGMMA 1
#endif

// The same for wgmma, which reads both operands from shared memory, and works on while its warps copy.
template <class Math, class Tile, bool DEPTH_CONTIGUOUS>
struct WarpgroupMainloop {
  using Element = typename Math::Element;
  static constexpr cute::GMMA::Major kMajor = DEPTH_CONTIGUOUS ? cute::GMMA::Major::K : cute::GMMA::Major::MN;
  using Mma = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 Shape<Int<Tile::kRows>, Int<Tile::kColumns>, Int<Tile::kDepth>>, kMajor, kMajor>(),
      Layout<Shape<_2, _1, _1>>{}));  // two warpgroups, each with half of the rows
  using Atom = std::conditional_t<DEPTH_CONTIGUOUS, cute::GMMA::Layout_K_SW128_Atom<Element>,
                                  cute::GMMA::Layout_MN_SW128_Atom<Element>>;
  using Order = std::conditional_t<DEPTH_CONTIGUOUS, cute::Step<_1, _2, cute::_3>, cute::Step<_2, _1, cute::_3>>;
  template <int LINES>
  using SharedLayout =
      decltype(cute::tile_to_shape(Atom{}, Shape<Int<LINES>, Int<Tile::kDepth>, Int<Tile::kStages>>{}, Order{}));
  using LayoutA = SharedLayout<Tile::kRows>;
  using LayoutB = SharedLayout<Tile::kColumns>;
  static constexpr int kSharedBytes = (cute::cosize_v<LayoutA> + cute::cosize_v<LayoutB>) * sizeof(Element);

  template <class Load, class Sums>
  static __device__ __forceinline__ void run(Element* shared, int tiles, Load&& load, Sums& sums) {
    using namespace cute;
    // Tiles copied ahead. One stage is being read, and one may still be by the slower warpgroup.
    constexpr int kAhead = Tile::kStages - 2;
    Tensor a = make_tensor(make_smem_ptr(shared), LayoutA{});
    Tensor b = make_tensor(make_smem_ptr(shared + cosize_v<LayoutA>), LayoutB{});
    Mma mma;
    auto mine = mma.get_slice(threadIdx.x);
    Tensor fa = mine.make_fragment_A(mine.partition_A(a));
    Tensor fb = mine.make_fragment_B(mine.partition_B(b));

    for (int tile = 0; tile < kAhead; ++tile) {
      if (tile < tiles) load(tile);
      cp_async_fence();
    }
    warpgroup_fence_operand(sums);
    for (int tile = 0; tile < tiles; ++tile) {
      int stage = tile % Tile::kStages;
      cp_async_wait<kAhead - 1>();
      asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");  // wgmma reads by another path than copies write
      __syncthreads();
      warpgroup_arrive();
      gemm(mma, fa(_, _, _, stage), fb(_, _, _, stage), sums);
      warpgroup_commit_batch();
      // Into the stage of two tiles ago, which both warpgroups had read before the barrier above.
      if (tile + kAhead < tiles) load((tile + kAhead) % Tile::kStages);
      cp_async_fence();
      warpgroup_wait<1>();
    }
    warpgroup_wait<0>();
    warpgroup_fence_operand(sums);
    cp_async_wait<0>();
    __syncthreads();
  }
};

template <class Math, class Tile, bool DEPTH_CONTIGUOUS>
using MainloopFor = std::conditional_t<Tile::kWarpgroups, WarpgroupMainloop<Math, Tile, DEPTH_CONTIGUOUS>,
                                       Mainloop<Math, Tile, DEPTH_CONTIGUOUS>>;

// A kernel's body, empty where its tile's instructions do not exist; nothing launches it there.
#ifdef VMAE_HAS_WGMMA
template <class Tile>
constexpr bool kCompiled = true;
#else
template <class Tile>
constexpr bool kCompiled = !Tile::kWarpgroups;
#endif

// --- the convolution, and the gradient of its input ----------------------------------------------------------------

template <class Element>
struct ConvolutionArguments {
  Gather gather;
  const Element *body, *head, *weight, *bias;  // head and bias may be null
  Element *result, *result_head;               // the head may be null
  bool silu;
  bool wide;  // the result's channels and addresses allow stores of 16 bytes
};

template <class Math, class Tile>
struct ConvolutionKernel {
  using Element = typename Math::Element;
  using Loop = MainloopFor<Math, Tile, true>;
  using Operands = ConvolutionOperands<Element, Tile::kRows, Tile::kColumns, Tile::kDepth, Tile::kVector>;
  static constexpr int kLine = Tile::kColumns + 16 / sizeof(Element);  // of the result's tile; so that banks differ
  static constexpr int kResultBytes = Tile::kRows * kLine * sizeof(Element);
  static constexpr int kSharedBytes = Loop::kSharedBytes > kResultBytes ? Loop::kSharedBytes : kResultBytes;

  static __device__ __forceinline__ void run(const ConvolutionArguments<Element>& arguments, Element* shared) {
    using namespace cute;
    const Gather& g = arguments.gather;
    int thread = threadIdx.x;
    // Neighbouring blocks share the source's rows.
    int column_tiles = (g.columns + Tile::kColumns - 1) / Tile::kColumns;
    int64_t first_row = static_cast<int64_t>(blockIdx.x / column_tiles) * Tile::kRows;
    int first_column = static_cast<int>(blockIdx.x % column_tiles) * Tile::kColumns;

    Operands operands(g, arguments.body, arguments.head, arguments.weight, first_row, first_column, thread);
    Tensor a = make_tensor(make_smem_ptr(shared), typename Loop::LayoutA{});
    Tensor b = make_tensor(make_smem_ptr(shared + cosize_v<typename Loop::LayoutA>), typename Loop::LayoutB{});
    auto load = [&](int stage) {
      copy_tile<typename Operands::RowShare, Tile::kVector, true>(a, stage, [&](int i) { return operands.source(i); });
      copy_tile<typename Operands::ColumnShare, Tile::kVector, true>(b, stage,
                                                                     [&](int i) { return operands.weights(g, i); });
      operands.advance(g);
    };
    typename Loop::Mma mma;
    auto mine = mma.get_slice(thread);
    auto tile_shape = Shape<Int<Tile::kRows>, Int<Tile::kColumns>>{};
    Tensor sums = partition_fragment_C(mma, tile_shape);
    clear(sums);
    int64_t depth = static_cast<int64_t>(g.taps()) * g.channels;
    Loop::run(shared, static_cast<int>((depth + Tile::kDepth - 1) / Tile::kDepth), load, sums);

    Tensor where = mine.partition_C(make_identity_tensor(tile_shape));
    CUTE_UNROLL
    for (int i = 0; i < size(sums); ++i) {
      int row = get<0>(where(i)), column = get<1>(where(i));
      float value = sums(i);
      if (arguments.bias && first_column + column < g.columns) {
        value += static_cast<float>(arguments.bias[first_column + column]);
      }
      if (arguments.silu) value = value / (1.0f + __expf(-value));
      shared[row * kLine + column] = static_cast<Element>(value);
    }
    __syncthreads();
    store(arguments, shared, first_row, first_column, thread);
  }

  static __device__ __forceinline__ void store(const ConvolutionArguments<Element>& arguments, const Element* shared,
                                               int64_t first_row, int first_column, int thread) {
    constexpr int kVector = 16 / sizeof(Element);
    using Rows = Share<Tile::kRows, Tile::kColumns, kVector>;
    const Gather& g = arguments.gather;
    int column = Rows::element(thread);
    for (int i = 0; i < Rows::kLines; ++i) {
      int line = Rows::line(thread, i);
      int64_t row = first_row + line;
      if (row >= g.rows() || first_column + column >= g.columns) continue;
      Element* to = result_place(g, arguments.result, arguments.result_head, position(g, row));
      if (to == nullptr) continue;
      to += first_column + column;
      const Element* from = shared + line * kLine + column;
      if (arguments.wide) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      } else {
        for (int j = 0; j < kVector && first_column + column + j < g.columns; ++j) to[j] = from[j];
      }
    }
  }
};

template <class Math, class Tile>
__global__ void __launch_bounds__(kThreads, Tile::kBlocks)
convolution_kernel(const __grid_constant__ ConvolutionArguments<typename Math::Element> arguments) {
  extern __shared__ __align__(1024) unsigned char shared[];  // wgmma's swizzle counts from there
  if constexpr (kCompiled<Tile>) {
    ConvolutionKernel<Math, Tile>::run(arguments, reinterpret_cast<typename Math::Element*>(shared));
  }
}

// --- the gradient of the weight ------------------------------------------------------------------------------------

template <class Element>
struct WeightGradientArguments {
  Gather gather;  // the forward's
  const Element *body, *head, *gradient;
  float* partial;  // [slices, outputs, taps, channels]
  int slices;
};

template <class Math, class Tile>
struct WeightGradientKernel {
  using Element = typename Math::Element;
  using Loop = MainloopFor<Math, Tile, false>;
  using Operands = WeightGradientOperands<Element, Tile::kRows, Tile::kColumns, Tile::kDepth, Tile::kVector>;
  static constexpr int kSharedBytes = Loop::kSharedBytes;

  static __device__ __forceinline__ void run(const WeightGradientArguments<Element>& arguments, Element* shared) {
    using namespace cute;
    const Gather& g = arguments.gather;
    int thread = threadIdx.x;
    int columns = g.taps() * g.channels;
    int column_tiles = (columns + Tile::kColumns - 1) / Tile::kColumns;
    int first_row = static_cast<int>(blockIdx.x / column_tiles) * Tile::kRows;
    int first_column = static_cast<int>(blockIdx.x % column_tiles) * Tile::kColumns;
    int64_t positions = g.rows(), length = slice_length(positions, arguments.slices, Tile::kDepth);
    int64_t first = blockIdx.y * length, last = first + length < positions ? first + length : positions;

    Operands operands(g, arguments.body, arguments.head, arguments.gradient, first, last, first_row, first_column,
                      thread);
    Tensor a = make_tensor(make_smem_ptr(shared), typename Loop::LayoutA{});
    Tensor b = make_tensor(make_smem_ptr(shared + cosize_v<typename Loop::LayoutA>), typename Loop::LayoutB{});
    auto load = [&](int stage) {
      copy_tile<typename Operands::RowShare, Tile::kVector, false>(
          a, stage, [&](int i) { return operands.gradients(g, thread, i); });
      copy_tile<typename Operands::ColumnShare, Tile::kVector, false>(
          b, stage, [&](int i) { return operands.source(g, thread, i); });
      operands.advance(g);
    };
    typename Loop::Mma mma;
    auto tile_shape = Shape<Int<Tile::kRows>, Int<Tile::kColumns>>{};
    Tensor sums = partition_fragment_C(mma, tile_shape);
    clear(sums);
    int tiles = last > first ? static_cast<int>((last - first + Tile::kDepth - 1) / Tile::kDepth) : 0;
    Loop::run(shared, tiles, load, sums);

    Tensor where = mma.get_slice(thread).partition_C(make_identity_tensor(tile_shape));
    CUTE_UNROLL
    for (int i = 0; i < size(sums); ++i) {
      int64_t row = first_row + get<0>(where(i));
      int column = first_column + get<1>(where(i));
      if (row < g.columns && column < columns) {
        arguments.partial[(blockIdx.y * static_cast<int64_t>(g.columns) + row) * columns + column] = sums(i);
      }
    }
  }
};

template <class Math, class Tile>
__global__ void __launch_bounds__(kThreads, Tile::kBlocks)
weight_gradient_kernel(const __grid_constant__ WeightGradientArguments<typename Math::Element> arguments) {
  extern __shared__ __align__(1024) unsigned char shared[];  // wgmma's swizzle counts from there
  if constexpr (kCompiled<Tile>) {
    WeightGradientKernel<Math, Tile>::run(arguments, reinterpret_cast<typename Math::Element*>(shared));
  }
}

// The slices' sums, added in their order.
template <class Element>
__global__ void __launch_bounds__(kThreads)
sum_slices_kernel(const float* partial, int slices, int64_t count, Element* result) {
  int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  float sum = partial[i];
  for (int slice = 1; slice < slices; ++slice) sum += partial[slice * count + i];
  result[i] = static_cast<Element>(sum);
}

}  // namespace vmae
