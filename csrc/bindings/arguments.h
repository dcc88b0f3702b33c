// What both extension modules read from Python: tensors as addresses and strides, and the option structs.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <sstream>
#include <string>

#include "pile/options.h"

namespace pile::bindings {

namespace py = pybind11;

inline int64_t integer(PyObject* tuple, Py_ssize_t index) {
  const int64_t value = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, index));
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

inline void* address(PyObject* tuple, Py_ssize_t index) {
  return reinterpret_cast<void*>(static_cast<uintptr_t>(integer(tuple, index)));
}

// (address, dtype, strides), or None. `axes`: what a padded tensor's strides count; a packed one has none by query.
template <int N>
View view(PyObject* views, Py_ssize_t index, int64_t View::* const (&axes)[N]) {
  PyObject* item = PyTuple_GET_ITEM(views, index);
  View v;
  if (item == Py_None) return v;
  if (!PyTuple_Check(item) || PyTuple_GET_SIZE(item) != 3 || !PyTuple_Check(PyTuple_GET_ITEM(item, 2)))
    throw py::type_error("malformed view");
  v.data = address(item, 0);
  v.dtype = static_cast<DType>(integer(item, 1));
  PyObject* strides = PyTuple_GET_ITEM(item, 2);
  const Py_ssize_t rank = PyTuple_GET_SIZE(strides);
  for (Py_ssize_t k = 0; k < rank && k < N; ++k) v.*axes[N - 1 - k] = integer(strides, rank - 1 - k);
  return v;
}

// (queries, slots, teachers), and the views in the order of pile_fast/backends/native.py.
inline Batch read_batch(PyObject* sizes, PyObject* views) {
  if (PyTuple_GET_SIZE(sizes) != 3 || PyTuple_GET_SIZE(views) != 9) throw py::type_error("malformed call");
  Batch batch;
  batch.queries = integer(sizes, 0);
  batch.slots = integer(sizes, 1);
  batch.teachers = integer(sizes, 2);
  batch.student = view(views, 0, {&View::query, &View::document});
  batch.teacher = view(views, 1, {&View::query, &View::document, &View::teacher});
  batch.target = view(views, 2, {&View::query, &View::document});
  batch.labels = view(views, 3, {&View::query, &View::document});
  batch.mask = view(views, 4, {&View::query, &View::document});
  batch.cu_seqlens = view(views, 5, {&View::document});
  batch.prior = view(views, 6, {&View::query, &View::teacher});
  batch.weights = view(views, 7, {&View::query, &View::document});
  batch.query_weights = view(views, 8, {&View::query});
  return batch;
}

inline Outputs read_outputs(PyObject* addresses) {
  if (PyTuple_GET_SIZE(addresses) != 6) throw py::type_error("malformed call");
  return {address(addresses, 0), address(addresses, 1), address(addresses, 2),
          address(addresses, 3), address(addresses, 4), address(addresses, 5)};
}

inline void check_inputs(const Batch& batch, const EnsembleOptions* ensemble, const LossOptions* loss) {
  if (batch.slots == 0 || (batch.queries == 0 && !batch.packed())) return;  // an empty tensor has no address
  if (loss && !batch.student.data) throw py::value_error("student_logits: missing");
  if (loss && loss->alpha > 0 && !loss->distillation.given()) throw py::value_error("distillation: missing");
  if (loss && loss->alpha < 1 && !loss->label_loss.given()) throw py::value_error("label_loss: missing");
  if (loss && loss->alpha > 0 && !ensemble && !batch.target.data) throw py::value_error("target_logits: needed for alpha > 0");
  if (loss && loss->alpha < 1 && !batch.labels.data) throw py::value_error("labels: needed for alpha < 1");
  if (ensemble && !batch.teacher.data) throw py::value_error("teacher_logits: missing");
}

inline void set_option(const char*, py::handle value, int64_t& option) { option = value.cast<int64_t>(); }
inline void set_option(const char*, py::handle value, double& option) { option = value.cast<double>(); }

template <class Enum>
std::enable_if_t<std::is_enum_v<Enum>> set_option(const char* name, py::handle value, Enum& option) {
  const auto given = value.cast<std::string>();
  std::istringstream names(names_of(Enum{}));
  int index = 0;
  for (std::string word; names >> word; ++index) {
    while (word.back() == ',' || word.back() == '_') word.pop_back();
    if (word == given) {
      option = static_cast<Enum>(index);
      return;
    }
  }
  throw py::value_error(std::string(name) + ": expected one of " + names_of(Enum{}) + ", got '" + given + "'");
}

// A term is its key and its numbers by name.
template <class... Terms>
void set_option(const char* name, py::handle value, OneOf<Terms...>& option) {
  const auto [key, numbers] = value.cast<std::pair<std::string, std::map<std::string, double>>>();
  OneOf<Terms...> found;
  OneOf<Terms...>::each([&, key = key, numbers = numbers](auto term) {
    if (key != term.kKey) return;
    size_t known = 0;
    term.each_number([&](const char* number, double& to) {
      const auto own = numbers.find(number);
      if (own == numbers.end()) throw py::value_error(std::string(name) + ": '" + key + "' needs its " + number);
      to = own->second;
      ++known;
    });
    if (known < numbers.size()) throw py::value_error(std::string(name) + ": '" + key + "' got a number that it does not know");
    found = OneOf<Terms...>::of(term);
  });
  if (!found.given()) throw py::value_error(std::string(name) + ": this module has no '" + key + "'");
  option = found;
}

// The keys of the terms that `has(Term{})`.
template <class Has>
py::tuple keys(Has has) {
  py::list terms;
  const auto add = [&](auto term) {
    if (has(term)) terms.append(term.kKey);
  };
  Distillation::each(add);
  LabelLoss::each(add);
  return py::tuple(terms);
}

// The structs, to be filled attribute by attribute, and TERMS, the keys of those that `has(Term{})`.
// module_local: each extension has its own Python type of the struct.
template <class Has>
void bind_options(py::module_& m, Has has) {
  py::class_<EnsembleOptions> ensemble(m, "EnsembleOptions", py::module_local());
  py::class_<LossOptions> loss(m, "LossOptions", py::module_local());
  ensemble.def(py::init<>());
  loss.def(py::init<>());
#define PILE_ENSEMBLE_OPTION(type, name) \
  ensemble.def_property(#name, nullptr, [](EnsembleOptions& o, py::handle value) { set_option(#name, value, o.name); });
#define PILE_LOSS_OPTION(type, name) \
  loss.def_property(#name, nullptr, [](LossOptions& o, py::handle value) { set_option(#name, value, o.name); });
  PILE_ENSEMBLE_OPTIONS(PILE_ENSEMBLE_OPTION)
  PILE_LOSS_OPTIONS(PILE_LOSS_OPTION)
#undef PILE_ENSEMBLE_OPTION
#undef PILE_LOSS_OPTION
  m.attr("TERMS") = keys(has);
}

}  // namespace pile::bindings
