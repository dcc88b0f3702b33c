// pile_fast._cuda: the CUDA backend as a Python module. Tensors come as device addresses and strides, the stream as a number; no
// torch header is seen, so one build serves every version of PyTorch. pile_fast/backends/cuda.py is the only caller.
#include "../cuda/launch.h"
#include "arguments.h"

namespace py = pybind11;

namespace {

using pile::gpu::check;
using pile::gpu::Device;

// Makes a device current and the caller's again.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = before_ != device;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

Device device(int index) {
  Device device;
  check(cudaDeviceGetAttribute(&device.processors, cudaDevAttrMultiProcessorCount, index), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&device.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index), "cudaDeviceGetAttribute");
  return device;
}

std::string unavailable() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  return count > 0 ? "" : "no CUDA device";
}

pile::gpu::Call read_call(const py::tuple& sizes, const py::tuple& views, const pile::EnsembleOptions* ensemble,
                          const pile::LossOptions* loss, const py::tuple& outputs, const py::tuple& more) {
  pile::gpu::Call call;
  call.batch = pile::bindings::read_batch(sizes.ptr(), views.ptr());
  pile::bindings::check_inputs(call.batch, ensemble, loss);
  call.out = pile::bindings::read_outputs(outputs.ptr());
  call.set_options(ensemble, loss);
  call.losses = static_cast<float*>(pile::bindings::address(more.ptr(), 0));
  call.has_pairs = static_cast<int32_t*>(pile::bindings::address(more.ptr(), 1));
  call.scratch = static_cast<float*>(pile::bindings::address(more.ptr(), 2));
  call.gradient_dtype = static_cast<pile::DType>(pile::bindings::integer(more.ptr(), 3));
  return call;
}

void reduce(const pile::gpu::Call& call, const py::tuple& more, const Device& device, cudaStream_t stream) {
  if (call.loss.reduction == pile::Reduction::none) return;
  void* scaled = pile::bindings::address(more.ptr(), 4);
  pile::gpu::reduce(call, scaled, static_cast<pile::DType>(pile::bindings::integer(more.ptr(), 5)), device, stream);
}

// `more`: addresses of losses and has_pairs by query and of the scratch buffer, the gradient's dtype, the address of the scaled
// gradient and its dtype. `where`: device index, stream.
void run(const py::tuple& sizes, const py::tuple& views, const pile::EnsembleOptions* ensemble, const pile::LossOptions* loss,
         const py::tuple& outputs, const py::tuple& more, const pile::gpu::ShortPlan& plan, const Device& device,
         const py::tuple& where) {
  const pile::gpu::Call call = read_call(sizes, views, ensemble, loss, outputs, more);
  const auto stream = static_cast<cudaStream_t>(pile::bindings::address(where.ptr(), 1));
  OnDevice on(int(pile::bindings::integer(where.ptr(), 0)));
  pile::gpu::run_short(call, plan, stream);
  if (loss) reduce(call, more, device, stream);
}

// Lists of any length. Sorting is PyTorch's, so a call comes in parts: the keys, then, with `order` what sorting gave (addresses of sorted
// keys and of the order, 0 where there is none), an ensemble into outputs or a loss against the target.
void long_keys(const py::tuple& sizes, const py::tuple& views, const pile::EnsembleOptions* ensemble, int64_t keys,
               const py::tuple& where) {
  pile::gpu::Call call;
  call.batch = pile::bindings::read_batch(sizes.ptr(), views.ptr());
  call.set_options(ensemble, nullptr);
  OnDevice on(int(pile::bindings::integer(where.ptr(), 0)));
  pile::gpu::launch_keys(call, reinterpret_cast<int64_t*>(keys), call.has_ensemble,
                         static_cast<cudaStream_t>(pile::bindings::address(where.ptr(), 1)));
}

int64_t long_bytes(const py::tuple& sizes, const py::tuple& views, const pile::EnsembleOptions* ensemble,
                   const pile::LossOptions* loss) {
  pile::gpu::Call call;
  call.batch = pile::bindings::read_batch(sizes.ptr(), views.ptr());
  call.set_options(ensemble, loss);
  return ensemble ? pile::gpu::long_ensemble_bytes(call) : pile::gpu::long_loss_bytes(call);
}

void run_long(const py::tuple& sizes, const py::tuple& views, const pile::EnsembleOptions* ensemble,
              const pile::LossOptions* loss, const py::tuple& outputs, const py::tuple& more, const py::tuple& order,
              const Device& device, const py::tuple& where) {
  const pile::gpu::Call call = read_call(sizes, views, ensemble, loss, outputs, more);
  const auto stream = static_cast<cudaStream_t>(pile::bindings::address(where.ptr(), 1));
  const auto* keys = static_cast<const int64_t*>(pile::bindings::address(order.ptr(), 0));
  const auto* sorted = static_cast<const int64_t*>(pile::bindings::address(order.ptr(), 1));
  OnDevice on(int(pile::bindings::integer(where.ptr(), 0)));
  if (ensemble) return pile::gpu::run_long_ensemble(call, call.scratch, keys, sorted, stream);
  pile::gpu::run_long_loss(call, call.scratch, keys, sorted, stream);
  reduce(call, more, device, stream);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of pile_fast.";
  pile::bindings::bind_options(m, [](auto) { return true; });
  py::class_<Device>(m, "Device")
      .def_readonly("processors", &Device::processors)
      .def_readonly("shared_bytes", &Device::shared_bytes);
  py::class_<pile::gpu::ShortPlan>(m, "ShortPlan")
      .def_readonly("capacity", &pile::gpu::ShortPlan::capacity)
      .def_readonly("scratch_words", &pile::gpu::ShortPlan::scratch_words)
      .def_readonly("threads", &pile::gpu::ShortPlan::threads)
      .def_readwrite("rows", &pile::gpu::ShortPlan::rows)
      .def_readonly("warps", &pile::gpu::ShortPlan::warps)
      .def_readonly("shared_bytes", &pile::gpu::ShortPlan::shared_bytes);
  m.def("device", &device, "What plans depend on.");
  m.def("unavailable", &unavailable, "Empty if there is a device, else CUDA's reason.");
  m.def("plan_short", &pile::gpu::plan_short);
  m.def("run", &run, "Launch one call for short lists.");
  m.def("long_keys", &long_keys);
  m.def("long_bytes", &long_bytes, "Bytes of scratch that run_long wants.");
  m.def("run_long", &run_long, "Launch an ensemble, or a loss, of lists of any length.");
#if defined(PILE_EMULATION)
  m.def("set_order", &emulation::set_order);
  m.def("set_shared_limit", &emulation::set_shared_limit);
#endif
}
