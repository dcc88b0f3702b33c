// What both extension modules read from Python: tensors as addresses and strides, and the option structs.
#pragma once

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "pile/options.h"

namespace pile {
namespace bindings {

namespace py = pybind11;

inline int64_t integer(PyObject* tuple, Py_ssize_t index) {
  const int64_t value = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, index));
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

inline void* address(PyObject* tuple, Py_ssize_t index) {
  return reinterpret_cast<void*>(static_cast<uintptr_t>(integer(tuple, index)));
}

// What the strides of a tensor count, in order.
enum Axis { query, document, teacher };

// (address, dtype, strides), or None. The last axes of `axes` are the tensor's: a packed tensor has no query axis.
template <int N>
View view(PyObject* views, Py_ssize_t index, const Axis (&axes)[N]) {
  PyObject* item = PyTuple_GET_ITEM(views, index);
  View v;
  if (item == Py_None) return v;
  if (!PyTuple_Check(item) || PyTuple_GET_SIZE(item) != 3 || !PyTuple_Check(PyTuple_GET_ITEM(item, 2)))
    throw py::type_error("malformed view");
  v.data = reinterpret_cast<const void*>(static_cast<uintptr_t>(integer(item, 0)));
  v.dtype = static_cast<DType>(integer(item, 1));
  PyObject* strides = PyTuple_GET_ITEM(item, 2);
  const Py_ssize_t rank = PyTuple_GET_SIZE(strides);
  for (Py_ssize_t k = 0; k < rank && k < N; ++k) {
    const int64_t stride = integer(strides, rank - 1 - k);
    switch (axes[N - 1 - k]) {
      case query:
        v.query = stride;
        break;
      case document:
        v.document = stride;
        break;
      case teacher:
        v.teacher = stride;
        break;
    }
  }
  return v;
}

// (queries, slots, teachers), and the views in the order of pile_fast/backends/native.py.
inline Batch read_batch(PyObject* sizes, PyObject* views) {
  if (PyTuple_GET_SIZE(sizes) != 3 || PyTuple_GET_SIZE(views) != 7) throw py::type_error("malformed call");
  Batch batch;
  batch.queries = integer(sizes, 0);
  batch.slots = integer(sizes, 1);
  batch.teachers = integer(sizes, 2);
  batch.student = view(views, 0, {query, document});
  batch.teacher = view(views, 1, {query, document, teacher});
  batch.target = view(views, 2, {query, document});
  batch.labels = view(views, 3, {query, document});
  batch.mask = view(views, 4, {query, document});
  batch.cu_seqlens = view(views, 5, {document});
  batch.prior = view(views, 6, {query, teacher});
  return batch;
}

inline Outputs read_outputs(PyObject* addresses) {
  if (PyTuple_GET_SIZE(addresses) != 5) throw py::type_error("malformed call");
  return {address(addresses, 0), address(addresses, 1), address(addresses, 2), address(addresses, 3), address(addresses, 4)};
}

inline void check_inputs(const Batch& batch, const EnsembleOptions* ensemble, const LossOptions* loss) {
  if (batch.slots == 0 || (batch.queries == 0 && !batch.packed())) return;  // an empty tensor has no address
  if (loss && !batch.student.data) throw py::value_error("student_logits: missing");
  if (loss && loss->alpha > 0 && !ensemble && !batch.target.data) throw py::value_error("target_logits: needed for alpha > 0");
  if (loss && loss->alpha < 1 && !batch.labels.data) throw py::value_error("labels: needed for alpha < 1");
  if (ensemble && !batch.teacher.data) throw py::value_error("teacher_logits: missing");
}

// module_local: each extension has its own Python type of the struct.
inline void bind_options(py::module_& m) {
  py::class_<EnsembleOptions>(m, "EnsembleOptions", py::module_local())
      .def(py::init([](int64_t iterations, double step_size, int granularity, int normalize, double temperature, double margin,
                       int pair_weight, int pairwise) {
        return EnsembleOptions{iterations,  step_size, static_cast<Granularity>(granularity), static_cast<Normalize>(normalize),
                               temperature, margin,    static_cast<PairWeight>(pair_weight),  static_cast<PairSum>(pairwise)};
      }));
  py::class_<LossOptions>(m, "LossOptions", py::module_local())
      .def(py::init([](double alpha, int distillation, double temperature, int pair_weight, int reduction, int pairwise) {
        return LossOptions{alpha,
                           static_cast<Distillation>(distillation),
                           temperature,
                           static_cast<PairWeight>(pair_weight),
                           static_cast<Reduction>(reduction),
                           static_cast<PairSum>(pairwise)};
      }));
}

}  // namespace bindings
}  // namespace pile
