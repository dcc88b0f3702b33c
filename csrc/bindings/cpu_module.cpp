// pile_fast._cpu: the CPU backend as a Python module. Tensors come as addresses and strides, so that one build serves every
// version of PyTorch; pile_fast/backends/cpp.py is the only caller and answers for them.
#include <pybind11/pybind11.h>

#include "../cpu/job.h"

namespace py = pybind11;

namespace {

int64_t integer(PyObject* tuple, Py_ssize_t index) {
  const int64_t value = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, index));
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

// What the strides of a tensor count, in order.
enum Axis { query, document, teacher };

// (address, dtype, strides), or None. The last axes of `axes` are the tensor's: a packed tensor has no query axis.
template <int N>
pile::View view(PyObject* views, Py_ssize_t index, const Axis (&axes)[N]) {
  PyObject* item = PyTuple_GET_ITEM(views, index);
  pile::View v;
  if (item == Py_None) return v;
  if (!PyTuple_Check(item) || PyTuple_GET_SIZE(item) != 3 || !PyTuple_Check(PyTuple_GET_ITEM(item, 2))) throw py::type_error("_cpu.run: malformed view");
  v.data = reinterpret_cast<const void*>(static_cast<uintptr_t>(integer(item, 0)));
  v.dtype = static_cast<pile::DType>(integer(item, 1));
  PyObject* strides = PyTuple_GET_ITEM(item, 2);
  const Py_ssize_t rank = PyTuple_GET_SIZE(strides);
  for (Py_ssize_t k = 0; k < rank && k < N; ++k) {
    const int64_t stride = integer(strides, rank - 1 - k);
    switch (axes[N - 1 - k]) {
      case query: v.query = stride; break;
      case document: v.document = stride; break;
      case teacher: v.teacher = stride; break;
    }
  }
  return v;
}

void* address(PyObject* tuple, Py_ssize_t index) { return reinterpret_cast<void*>(static_cast<uintptr_t>(integer(tuple, index))); }

// False: cu_seqlens does not start at 0, decreases, or runs past the documents; or a query is too long to count in 31 bits.
bool offsets_fit(const pile::Batch& batch) {
  constexpr int64_t kLongest = 2147483647;
  if (!batch.packed()) return batch.slots <= kLongest;
  if (batch.first(0) != 0) return false;
  for (int64_t q = 0; q < batch.queries; ++q)
    if (batch.length(q) < 0 || batch.length(q) > kLongest) return false;
  const int64_t end = batch.queries ? batch.begin(batch.queries - 1) + batch.length(batch.queries - 1) : 0;
  return end <= batch.slots;
}

bool run(py::tuple sizes, py::tuple views, const pile::EnsembleOptions* ensemble, const pile::LossOptions* loss, py::tuple outputs,
         bool wide, int threads) {
  pile::Job job;
  PyObject* s = sizes.ptr();
  PyObject* v = views.ptr();
  PyObject* o = outputs.ptr();
  if (PyTuple_GET_SIZE(s) != 3 || PyTuple_GET_SIZE(v) != 7 || PyTuple_GET_SIZE(o) != 5) throw py::type_error("_cpu.run: malformed call");
  job.batch.queries = integer(s, 0);
  job.batch.slots = integer(s, 1);
  job.batch.teachers = integer(s, 2);
  job.batch.student = view(v, 0, {query, document});
  job.batch.teacher = view(v, 1, {query, document, teacher});
  job.batch.target = view(v, 2, {query, document});
  job.batch.labels = view(v, 3, {query, document});
  job.batch.mask = view(v, 4, {query, document});
  job.batch.cu_seqlens = view(v, 5, {document});
  job.batch.prior = view(v, 6, {query, teacher});
  job.out.logits = address(o, 0);
  job.out.weights = address(o, 1);
  job.out.trace = address(o, 2);
  job.out.loss = address(o, 3);
  job.out.gradient = address(o, 4);
  job.ensemble = ensemble;
  job.loss = loss;
  job.wide = wide;
  job.threads = threads;
  if (job.batch.slots > 0 && (job.batch.queries > 0 || job.batch.packed())) {  // an empty tensor has no address
    if (loss && !job.batch.student.data) throw py::value_error("student_logits: missing");
    if (loss && loss->alpha > 0 && !ensemble && !job.batch.target.data) throw py::value_error("target_logits: needed for alpha > 0");
    if (loss && loss->alpha < 1 && !job.batch.labels.data) throw py::value_error("labels: needed for alpha < 1");
    if (ensemble && !job.batch.teacher.data) throw py::value_error("teacher_logits: missing");
  }
  if (!offsets_fit(job.batch)) return false;
  py::gil_scoped_release release;
  pile::run(job);
  return true;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of pile_fast.";
  py::class_<pile::EnsembleOptions>(m, "EnsembleOptions")
      .def(py::init([](int64_t iterations, double step_size, int granularity, int normalize, double temperature, double margin,
                       int pair_weight, int pairwise) {
        return pile::EnsembleOptions{iterations, step_size, static_cast<pile::Granularity>(granularity),
                                     static_cast<pile::Normalize>(normalize), temperature, margin,
                                     static_cast<pile::PairWeight>(pair_weight), static_cast<pile::PairSum>(pairwise)};
      }));
  py::class_<pile::LossOptions>(m, "LossOptions")
      .def(py::init([](double alpha, int distillation, double temperature, int pair_weight, int reduction, int pairwise) {
        return pile::LossOptions{alpha, static_cast<pile::Distillation>(distillation), temperature,
                                 static_cast<pile::PairWeight>(pair_weight), static_cast<pile::Reduction>(reduction),
                                 static_cast<pile::PairSum>(pairwise)};
      }));
  m.def("run", &run, "Run one call; False if cu_seqlens does not fit or a query is too long.");
  m.def("instruction_set", &pile::instruction_set, "The instruction set in use.");
  m.def("instruction_sets", &pile::instruction_sets, "Those this processor and this build have, best first.");
  m.def("set_instruction_set", &pile::set_instruction_set, "Use another one; False if it is not there.");
}
