// Convolutions of NHWC images by oneDNN, as an XLA FFI handler on XLA's own threads.
//
// Three bilinear maps between images x [B, H, W, C], kernels w [k, k, C, F] and outputs y [B, H', W', F], each the transpose of
// another: y of (x, w), x of (y, w), w of (x, y). Operands are float32 or bfloat16, the kernel that comes out is float32. A
// batch is cut into one part for each thread; oneDNN itself runs on one. Only its C interface is used, whose version 3 has kept
// its symbols and constants, so that none of its headers are needed. onednn.py compiles this file at its first use.

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Handle = void*;  // oneDNN's objects are opaque
using Dims = int64_t[12];
struct Argument {
  int what;
  Handle memory;
};
enum { kSource = 1, kDestination = 17, kWeights = 33, kDiffSource = 129, kDiffDestination = 145, kDiffWeights = 161 };
enum { kScratchpad = 80, kUserScratchpad = 1 };
enum { kQueryWeights = 131, kQueryDiffWeights = 132, kQueryScratchpad = 136 };
enum { kBfloat = 2, kFloat = 3 };
enum { kCpu = 1, kInOrder = 1, kAnyTag = 1, kForwardTraining = 64, kDirect = 1 };

#define ONEDNN_FUNCTIONS(F)                                                                                                \
  F(engine_create, int, (Handle*, int, size_t))                                                                            \
  F(stream_create, int, (Handle*, Handle, unsigned))                                                                       \
  F(memory_desc_create_with_strides, int, (Handle*, int, const int64_t*, int, const int64_t*))                             \
  F(memory_desc_create_with_tag, int, (Handle*, int, const int64_t*, int, int))                                            \
  F(memory_desc_equal, int, (Handle, Handle))                                                                              \
  F(memory_desc_get_size, size_t, (Handle))                                                                                \
  F(memory_create, int, (Handle*, Handle, Handle, void*))                                                                  \
  F(memory_destroy, int, (Handle))                                                                                         \
  F(primitive_desc_query_md, Handle, (Handle, int, int))                                                                   \
  F(primitive_attr_create, int, (Handle*))                                                                                 \
  F(primitive_attr_set_scratchpad_mode, int, (Handle, int))                                                                \
  F(primitive_create, int, (Handle*, Handle))                                                                              \
  F(primitive_execute, int, (Handle, Handle, int, const Argument*))                                                        \
  F(reorder_primitive_desc_create, int, (Handle*, Handle, Handle, Handle, Handle, Handle))                                 \
  F(convolution_forward_primitive_desc_create, int,                                                                        \
    (Handle*, Handle, int, int, Handle, Handle, Handle, Handle, const int64_t*, const int64_t*, const int64_t*,            \
     const int64_t*, Handle))                                                                                              \
  F(convolution_backward_data_primitive_desc_create, int,                                                                  \
    (Handle*, Handle, int, Handle, Handle, Handle, const int64_t*, const int64_t*, const int64_t*, const int64_t*, Handle, \
     Handle))                                                                                                              \
  F(convolution_backward_weights_primitive_desc_create, int,                                                               \
    (Handle*, Handle, int, Handle, Handle, Handle, Handle, const int64_t*, const int64_t*, const int64_t*, const int64_t*, \
     Handle, Handle))

#define DECLARE(name, result, arguments) result(*name) arguments = nullptr;
struct Library {
  ONEDNN_FUNCTIONS(DECLARE)
  void (*set_threads)(int) = nullptr;  // of OpenMP, where oneDNN was built with it
  int (*get_threads)() = nullptr;
  Handle engine = nullptr, attributes = nullptr;
} dnnl;
#undef DECLARE

void Check(int status, const char* what) {
  if (status != 0) throw std::string("oneDNN: ") + what + " failed with status " + std::to_string(status);
}

enum Kind { kForward = 0, kBackwardData = 1, kBackwardWeights = 2 };

struct Primitive {
  Handle primitive = nullptr, scratchpad = nullptr;  // scratchpad: the description of the memory that it works in
  size_t bytes = 0;
};

struct Plan {  // what one part of a batch runs; made once for each shape, and kept
  Primitive convolution, reorder;  // reorder: of the kernel, from HWIO for its use or back for its gradient; none where equal
  Handle x, y, plain, packed;           // descriptions of memory
  size_t bytes;                         // of the packed kernel
};

// kind, type, B, H, W, C, H', W', F, k (rows), k (columns), stride, pads
using Key = std::array<int64_t, 16>;

Handle Strided(std::array<int64_t, 4> dims, int type, std::array<int64_t, 4> strides) {
  Handle found;
  Check(dnnl.memory_desc_create_with_strides(&found, 4, dims.data(), type, strides.data()), "a description of memory");
  return found;
}

Handle Images(int64_t b, int64_t h, int64_t w, int64_t c, int type) {  // logical order NCHW, in memory NHWC
  return Strided({b, c, h, w}, type, {h * w * c, 1, w * c, c});
}

Primitive Create(Handle description, const char* what) {
  Primitive made;
  Check(dnnl.primitive_create(&made.primitive, description), what);
  made.scratchpad = dnnl.primitive_desc_query_md(description, kQueryScratchpad, 0);
  made.bytes = dnnl.memory_desc_get_size(made.scratchpad);
  return made;
}

const Plan& PlanOf(const Key& key) {
  static std::mutex mutex;
  static std::map<Key, Plan> plans;
  std::lock_guard<std::mutex> lock(mutex);
  auto found = plans.find(key);
  if (found != plans.end()) return found->second;
  auto [kind, type, b, h, w, c, height, width, f, kh, kw, stride, top, bottom, left, right] = key;
  Plan plan;
  plan.x = Images(b, h, w, c, type);
  plan.y = Images(b, height, width, f, type);
  const int kernel_type = kind == kBackwardWeights ? kFloat : type;
  plan.plain = Strided({f, c, kh, kw}, kernel_type, {1, f, kw * c * f, c * f});
  Handle any, of_gradient;
  const Dims kernel = {f, c, kh, kw}, strides = {stride, stride}, dilates = {0, 0}, low = {top, left}, high = {bottom, right};
  Check(dnnl.memory_desc_create_with_tag(&any, 4, kernel, type, kAnyTag), "a description of memory");
  Check(dnnl.memory_desc_create_with_tag(&of_gradient, 4, kernel, kFloat, kAnyTag), "a description of memory");
  Handle forward, chosen;
  Check(dnnl.convolution_forward_primitive_desc_create(&forward, dnnl.engine, kForwardTraining, kDirect, plan.x, any, nullptr,
                                                       plan.y, strides, dilates, low, high, dnnl.attributes),
        "a convolution");
  chosen = forward;
  if (kind == kBackwardData)
    Check(dnnl.convolution_backward_data_primitive_desc_create(&chosen, dnnl.engine, kDirect, plan.x, any, plan.y, strides,
                                                               dilates, low, high, forward, dnnl.attributes),
          "a convolution's gradient in its input");
  if (kind == kBackwardWeights)
    Check(dnnl.convolution_backward_weights_primitive_desc_create(&chosen, dnnl.engine, kDirect, plan.x, any, nullptr, plan.y,
                                                                  strides, dilates, low, high, forward, dnnl.attributes),
          "a convolution's gradient in its kernel");
  plan.convolution = Create(chosen, "a convolution");
  plan.packed = dnnl.primitive_desc_query_md(chosen, kind == kBackwardWeights ? kQueryDiffWeights : kQueryWeights, 0);
  plan.bytes = dnnl.memory_desc_get_size(plan.packed);
  if (!dnnl.memory_desc_equal(plan.packed, plan.plain)) {
    Handle description, from = plan.plain, to = plan.packed;
    if (kind == kBackwardWeights) std::swap(from, to);
    Check(dnnl.reorder_primitive_desc_create(&description, from, dnnl.engine, to, dnnl.engine, dnnl.attributes), "a reordering");
    plan.reorder = Create(description, "a reordering");
  }
  return plans.emplace(key, plan).first->second;
}

using Block = std::unique_ptr<void, decltype(&std::free)>;
Block Allocate(size_t bytes) { return Block(std::aligned_alloc(64, (bytes + 63) / 64 * 64), &std::free); }

class Memory {
 public:
  Memory(Handle description, void* data) { Check(dnnl.memory_create(&handle_, description, dnnl.engine, data), "memory"); }
  ~Memory() { dnnl.memory_destroy(handle_); }
  operator Handle() const { return handle_; }

 private:
  Handle handle_;
};

class OneThread {  // of OpenMP, as long as this lives: plans are made for one thread, and run on one
 public:
  OneThread() {
    if (dnnl.set_threads == nullptr) return;
    before_ = dnnl.get_threads();
    dnnl.set_threads(1);
  }
  ~OneThread() {
    if (dnnl.set_threads != nullptr) dnnl.set_threads(before_);
  }

 private:
  int before_ = 1;
};

void Execute(const Primitive& primitive, std::array<Argument, 4> arguments, int count) {
  static thread_local Handle stream = nullptr;
  static thread_local Block scratchpad(nullptr, &std::free);
  static thread_local size_t bytes = 0;
  if (stream == nullptr) Check(dnnl.stream_create(&stream, dnnl.engine, kInOrder), "a stream");
  if (bytes < primitive.bytes) scratchpad = Allocate(bytes = primitive.bytes);
  Memory memory(primitive.scratchpad, scratchpad.get());
  if (primitive.bytes > 0) arguments[count++] = {kScratchpad, memory};
  Check(dnnl.primitive_execute(primitive.primitive, stream, count, arguments.data()), "a primitive");
}

void Reorder(const Plan& plan, Handle from, void* source, Handle to, void* target) {
  Memory a(from, source), b(to, target);
  Execute(plan.reorder, {{{kSource, a}, {kDestination, b}}}, 2);
}

// Runs work(0..count-1): the calling thread takes part, and so never waits for a thread that the pool does not have.
template <typename Work>
void Spread(ffi::ThreadPool& pool, int64_t count, const Work& work) {
  struct State {
    std::atomic<int64_t> next{0};
    int64_t done = 0;
    std::string error;
    std::mutex mutex;
    std::condition_variable finished;
  };
  auto state = std::make_shared<State>();
  auto take = [state, count, &work] {  // `work` is alive while a part is not done, and untouched after
    for (int64_t i; (i = state->next++) < count;) {
      std::string error;
      try {
        work(i);
      } catch (const std::string& message) {
        error = message;
      }
      std::lock_guard<std::mutex> lock(state->mutex);
      if (!error.empty()) state->error = error;
      if (++state->done == count) state->finished.notify_all();
    }
  };
  for (int64_t i = 1; i < count; ++i) pool.Schedule(std::function<void()>(take));
  take();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->finished.wait(lock, [&] { return state->done == count; });
  if (!state->error.empty()) throw state->error;
}

ffi::Error Convolve(ffi::ThreadPool pool, ffi::AnyBuffer first, ffi::AnyBuffer second, ffi::Result<ffi::AnyBuffer> result,
                    int64_t kind, int64_t stride, ffi::Span<const int64_t> pads) {
  const ffi::AnyBuffer& out = *result;
  const ffi::AnyBuffer& x = kind == kBackwardData ? out : first;
  const ffi::AnyBuffer& y = kind == kForward ? out : kind == kBackwardData ? first : second;
  const ffi::AnyBuffer& w = kind == kBackwardWeights ? out : second;
  const auto xs = x.dimensions(), ys = y.dimensions(), ws = w.dimensions();
  const int type = x.element_type() == ffi::DataType::BF16 ? kBfloat : kFloat;
  const size_t item = type == kBfloat ? 2 : 4;
  const int64_t batch = xs[0], parts = std::max<int64_t>(1, std::min(batch, pool.num_threads()));
  char *xd = static_cast<char*>(x.untyped_data()), *yd = static_cast<char*>(y.untyped_data());
  void* wd = w.untyped_data();
  const size_t x_bytes = item * xs[1] * xs[2] * xs[3], y_bytes = item * ys[1] * ys[2] * ys[3];
  auto start = [&](int64_t part) { return batch * part / parts; };
  auto plan_of = [&](int64_t part) -> const Plan& {
    return PlanOf({kind, type, start(part + 1) - start(part), xs[1], xs[2], xs[3], ys[1], ys[2], ys[3], ws[0], ws[1], stride,
                   pads[0], pads[1], pads[2], pads[3]});
  };
  try {
    OneThread one_thread;
    if (kind != kBackwardWeights) {
      Handle packed_of = nullptr;
      Block packed(nullptr, &std::free);
      const Plan& plan = plan_of(0);
      if (plan.reorder.primitive != nullptr) {
        packed = Allocate(plan.bytes);
        packed_of = plan.packed;
        Reorder(plan, plan.plain, wd, plan.packed, packed.get());
      }
      Spread(pool, parts, [&](int64_t part) {
        OneThread one_thread;
        const Plan& plan = plan_of(part);
        void* kernel = wd;
        Block own(nullptr, &std::free);
        if (plan.reorder.primitive != nullptr && packed_of != nullptr && dnnl.memory_desc_equal(plan.packed, packed_of)) {
          kernel = packed.get();
        } else if (plan.reorder.primitive != nullptr) {  // a part of another size may want another order
          own = Allocate(plan.bytes);
          kernel = own.get();
          Reorder(plan, plan.plain, wd, plan.packed, kernel);
        }
        Memory xm(plan.x, xd + x_bytes * start(part)), ym(plan.y, yd + y_bytes * start(part)), wm(plan.packed, kernel);
        if (kind == kForward) {
          Execute(plan.convolution, {{{kSource, xm}, {kWeights, wm}, {kDestination, ym}}}, 3);
        } else {
          Execute(plan.convolution, {{{kDiffSource, xm}, {kWeights, wm}, {kDiffDestination, ym}}}, 3);
        }
      });
    } else {
      const int64_t count = w.element_count();
      std::vector<Block> gradients;  // of each part but the first, in the kernel's own order
      for (int64_t part = 1; part < parts; ++part) gradients.push_back(Allocate(sizeof(float) * count));
      Spread(pool, parts, [&](int64_t part) {
        OneThread one_thread;
        const Plan& plan = plan_of(part);
        void* target = part == 0 ? wd : gradients[part - 1].get();
        Block own(nullptr, &std::free);
        if (plan.reorder.primitive != nullptr) own = Allocate(plan.bytes);
        void* packed = plan.reorder.primitive != nullptr ? own.get() : target;
        Memory xm(plan.x, xd + x_bytes * start(part)), ym(plan.y, yd + y_bytes * start(part)), wm(plan.packed, packed);
        Execute(plan.convolution, {{{kSource, xm}, {kDiffDestination, ym}, {kDiffWeights, wm}}}, 3);
        if (plan.reorder.primitive != nullptr) Reorder(plan, plan.packed, packed, plan.plain, target);
      });
      for (const Block& gradient : gradients) {
        float *sum = static_cast<float*>(wd), *more = static_cast<float*>(gradient.get());
        for (int64_t i = 0; i < count; ++i) sum[i] += more[i];
      }
    }
  } catch (const std::string& message) {
    return ffi::Error::Internal(message);
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(avb_onednn_convolve, Convolve,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("kind")
                                  .Attr<int64_t>("stride")
                                  .Attr<ffi::Span<const int64_t>>("pads"));

// Whether oneDNN convolves bfloat16 on this processor, in all three maps.
extern "C" __attribute__((visibility("default"))) int avb_onednn_has_bfloat16() {
  try {
    OneThread one_thread;
    for (int64_t kind : {kForward, kBackwardData, kBackwardWeights})
      PlanOf({kind, kBfloat, 1, 4, 4, 8, 4, 4, 8, 3, 3, 1, 1, 1, 1, 1});
  } catch (const std::string&) {
    return 0;
  }
  return 1;
}

// Finds oneDNN in the shared library at `path`, once; what is wrong with it, or null.
extern "C" __attribute__((visibility("default"))) const char* avb_onednn_open(const char* path) {
  static std::string wrong;
  if (dnnl.engine != nullptr) return nullptr;  // plans are of the engine that is there
  Handle library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return (wrong = dlerror()).c_str();
#define FIND(name, result, arguments)                                                    \
  dnnl.name = reinterpret_cast<result(*) arguments>(dlsym(library, "dnnl_" #name));      \
  if (dnnl.name == nullptr) return (wrong = std::string("no dnnl_" #name " in it")).c_str();
  ONEDNN_FUNCTIONS(FIND)
#undef FIND
  dnnl.set_threads = reinterpret_cast<void (*)(int)>(dlsym(library, "omp_set_num_threads"));
  dnnl.get_threads = reinterpret_cast<int (*)()>(dlsym(library, "omp_get_max_threads"));
  if (dnnl.engine_create(&dnnl.engine, kCpu, 0) != 0) return "it has no engine for this processor";
  if (dnnl.primitive_attr_create(&dnnl.attributes) != 0 ||
      dnnl.primitive_attr_set_scratchpad_mode(dnnl.attributes, kUserScratchpad) != 0)
    return "it takes no attributes";
  return nullptr;
}
