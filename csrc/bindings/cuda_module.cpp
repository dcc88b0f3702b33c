// pile_fast._cuda: the CUDA backend as a Python module. Tensors come as device addresses and strides, the stream as a number;
// no torch header is seen, so one build serves every version of PyTorch. pile_fast/backends/cuda.py is the only caller.
#include "../cuda/launch.h"
#include "arguments.h"

namespace py = pybind11;

namespace {

using pile::gpu::Call;
using pile::gpu::check;
using pile::gpu::Device;

// Makes a place's device current and the caller's again.
class OnDevice {
 public:
  explicit OnDevice(const py::tuple& place) {
    const int device = int(pile::bindings::integer(place.ptr(), 0));
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

Call read_call(const py::tuple& sizes, const py::tuple& views, const pile::EnsembleOptions* ensemble,
               const pile::LossOptions* loss) {
  Call call;
  call.batch = pile::bindings::read_batch(sizes.ptr(), views.ptr());
  pile::bindings::check_inputs(call.batch, ensemble, loss);
  pile::gpu::set_options(call, ensemble, loss);
  return call;
}

// In the order of pile_fast.backends.cuda._Addresses.
void set_addresses(Call& call, const py::tuple& addresses) {
  if (addresses.size() != 9) throw py::type_error("malformed call");
  const auto at = [&](Py_ssize_t k) { return pile::bindings::address(addresses.ptr(), k); };
  call.out = {at(0), at(1), at(2), at(3), at(4), at(5)};
  call.scaled = at(6);
  call.losses = static_cast<float*>(at(7));
  call.has_pairs = static_cast<int32_t*>(at(7)) + call.batch.queries;
  call.scratch = at(8);
}

// `place`: device index, stream.
cudaStream_t stream_of(const py::tuple& place) { return static_cast<cudaStream_t>(pile::bindings::address(place.ptr(), 1)); }

void finish(const Call& call, const Device& device, cudaStream_t stream) {
  if (call.has_loss && call.loss.reduction != pile::Reduction::none) pile::gpu::reduce(call, device, stream);
}

void run_short(Call& call, const py::tuple& to, const pile::gpu::ShortPlan& plan, const Device& device,
               const py::tuple& place) {
  set_addresses(call, to);
  OnDevice on(place);
  pile::gpu::run_short(call, plan, stream_of(place));
  finish(call, device, stream_of(place));
}

void long_keys(const Call& call, int64_t keys, const py::tuple& place) {
  OnDevice on(place);
  pile::gpu::long_keys(call, reinterpret_cast<int64_t*>(keys), stream_of(place));
}

int64_t long_bytes(Call& call, const py::tuple& to) {
  set_addresses(call, to);
  return pile::gpu::long_bytes(call);
}

void run_long(Call& call, const py::tuple& to, int64_t keys, int64_t order, const Device& device, const py::tuple& place) {
  set_addresses(call, to);
  OnDevice on(place);
  const auto run = call.has_ensemble ? pile::gpu::run_long_ensemble : pile::gpu::run_long_loss;
  run(call, reinterpret_cast<const int64_t*>(keys), reinterpret_cast<const int64_t*>(order), stream_of(place));
  finish(call, device, stream_of(place));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels of pile_fast.";
  pile::bindings::bind_options(m, [](auto term) { return pile::gpu::has_term(term.kKey); });
  py::class_<Device>(m, "Device");
  py::class_<pile::gpu::ShortPlan>(m, "ShortPlan")
      .def_readonly("capacity", &pile::gpu::ShortPlan::capacity)
      .def_readonly("scratch_bytes", &pile::gpu::ShortPlan::scratch_bytes)
      .def_readonly("warps", &pile::gpu::ShortPlan::warps);
  py::class_<Call>(m, "Call").def(py::init(&read_call), "Sizes, views, options of the ensemble, options of the loss.");
  m.def("device", &device, "What plans depend on.");
  m.def("unavailable", &unavailable, "Empty if there is a device, else CUDA's reason.");
  m.def("plan_short", &pile::gpu::plan_short, "How short lists are run; capacity 0: they are long.");
  m.def("run_short", &run_short, "Launch a call for short lists.");
  // Sorting is PyTorch's, so a call for long lists comes in parts.
  m.def("long_keys", &long_keys, "Launch the keys to sort by.");
  m.def("long_bytes", &long_bytes, "Bytes of scratch that run_long wants, by what is asked for.");
  m.def("run_long", &run_long, "Launch an ensemble, or a loss, of lists of any length; sorted keys and their order, or 0.");
#if defined(PILE_EMULATION)
  m.def("set_order", &emulation::set_order);
  m.def("set_shared_limit", &emulation::set_shared_limit);
#endif
}
