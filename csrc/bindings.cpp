// The Python binding of the core: converts the arguments, releases the GIL and calls evaluate(). The code in
// pydistill/engine has checked the arguments (checks.py) and allocated the results before. Tensors are passed as
// addresses. Arguments that belong together form a group, which is a tuple, or None if it is absent.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <string>

#include "evaluate.hpp"
#include "gradient_memory.hpp"
#include "parallel.hpp"

namespace py = pybind11;
using namespace pydistill;

namespace {

// A name as an interned Python string. Each use of the macro creates its string once.
#define NAME(name)                                                      \
  [] {                                                                  \
    static PyObject* const interned = PyUnicode_InternFromString(name); \
    return py::handle(interned);                                        \
  }()

template <class T = void>
T* address(PyObject* number) {
  return static_cast<T*>(PyLong_AsVoidPtr(number));
}

constexpr std::array kArguments{"shape",   "student",     "teacher",  "top_k",       "labels",
                                "weights", "grad_output", "gradient", "row_outputs", "metrics"};

// The keyword arguments of run(). All of kArguments must be given, absent groups as None.
struct Arguments {
  const py::kwargs& by_name;

  PyObject* at(py::handle name) const {
    PyObject* value = PyDict_GetItemWithError(by_name.ptr(), name.ptr());
    if (!value) throw py::type_error("run() requires the argument " + name.cast<std::string>());
    return value;
  }

  // Throws if there are arguments other than kArguments.
  void check_names() const {
    for (const auto& [key, value] : by_name) {
      const auto name = key.cast<std::string>();
      if (std::find(kArguments.begin(), kArguments.end(), name) == kArguments.end())
        throw py::type_error("run() has no argument " + name);
    }
  }

  // Unless the group is None, calls fill(item); item(i) is the i-th of its `size` elements.
  template <class Fill>
  void group(py::handle name, Py_ssize_t size, const Fill& fill) const {
    PyObject* value = at(name);
    if (value == Py_None) return;
    if (!PyTuple_Check(value) || PyTuple_GET_SIZE(value) != size)
      throw py::type_error("run(): " + name.cast<std::string>() + " must be None or a tuple of length " +
                           std::to_string(size));
    fill([value](Py_ssize_t i) { return PyTuple_GET_ITEM(value, i); });
  }

  Matrix matrix(py::handle name) const {
    Matrix matrix;
    group(name, 3, [&](const auto& item) {
      matrix = {address(item(0)), DType(PyLong_AsLong(item(1))), PyLong_AsLongLong(item(2))};
    });
    return matrix;
  }
};

// The names of an enum's values, in the order of the enum.
template <class Enum>
constexpr std::array<const char*, 0> kNames{};
template <>
constexpr std::array kNames<DType>{"float32", "float64", "bfloat16", "float16"};
template <>
constexpr std::array kNames<Unlabeled>{"skip", "distill"};
template <>
constexpr std::array kNames<Reduction>{"none", "sum", "mean"};
template <>
constexpr std::array kNames<Divergence>{
#define DIVERGENCE(name, type) #name,
#include "divergences.def"
#undef DIVERGENCE
    "mse", "dkd"};

template <class Enum>
py::tuple names_of() {
  py::list names;
  for (const char* name : kNames<Enum>) names.append(name);
  return py::tuple(names);
}

std::string joined(const py::tuple& names) { return py::str(", ").attr("join")(names).cast<std::string>(); }

template <class T>
T option_value(const std::string& option, const py::handle& value) {
  if constexpr (std::is_enum_v<T>) {
    const auto name = value.cast<std::string>();
    for (size_t i = 0; i < kNames<T>.size(); ++i)
      if (name == kNames<T>[i]) return T(i);
    throw py::value_error("Options(): " + option + " must be one of " + joined(names_of<T>()) + "; got " + name);
  } else {
    return value.cast<T>();
  }
}

LossOptions loss_options(const py::kwargs& values) {
  LossOptions options;
  for (const auto& [key, value] : values) {
    const auto name = key.cast<std::string>();
#define OPTION(type, option, default_value)           \
  if (name == #option) {                              \
    options.option = option_value<type>(name, value); \
    continue;                                         \
  }
#include "options.def"
#undef OPTION
    throw py::type_error("Options() has no option " + name);
  }
  return options;
}

py::tuple usable_isas() {
  py::list names;
  for (const IsaVariant& isa : isa_variants())
    if (isa.usable()) names.append(isa.name);
  return py::tuple(names);
}

const IsaVariant& isa_named(const std::string& name) {
  for (const IsaVariant& isa : isa_variants())
    if (name == isa.name) {
      if (isa.usable()) return isa;
      throw py::value_error("isa(): this CPU does not support the variant " + name +
                            "; usable variants: " + joined(usable_isas()));
    }
  throw py::value_error("isa(): the compiled core was built without a variant " + name +
                        "; usable variants: " + joined(usable_isas()));
}

void put(const py::dict& by_name, py::handle name, const py::object& value) {
  if (PyDict_SetItem(by_name.ptr(), name.ptr(), value.ptr()) != 0) throw py::error_already_set();
}

// The results by name, or {"problem": "label" or "weight", "row": number} if a label or a weight is invalid.
py::dict results(const Evaluation& found, bool want_metrics) {
  py::dict by_name;
  if (found.problem != Problem::none) {
    put(by_name, NAME("problem"), py::str(found.problem == Problem::bad_label ? "label" : "weight"));
    put(by_name, NAME("row"), py::int_(found.problem_row));
    return by_name;
  }
  put(by_name, NAME("loss"), py::float_(found.loss));
  put(by_name, NAME("soft"), py::float_(found.soft));
  put(by_name, NAME("hard"), py::float_(found.hard));
  put(by_name, NAME("soft_items"), py::float_(found.soft_items));
  put(by_name, NAME("hard_items"), py::float_(found.hard_items));
  put(by_name, NAME("teacher_sums_to_one"), py::bool_(found.teacher_sums_to_one));
  if (!want_metrics) return by_name;
  py::dict metrics;
#define METRIC(name, rows) put(metrics, NAME(#name), py::float_(found.name));
#include "metrics.def"
#undef METRIC
  put(by_name, NAME("metrics"), metrics);
  return by_name;
}

// pydistill/_core.pyi documents the arguments.
py::dict run(const IsaVariant& isa, int threads, const LossOptions& options, const py::kwargs& by_name) {
  const Arguments given{by_name};
  RowBatch batch;
  batch.options = options;
  batch.student = given.matrix(NAME("student"));
  batch.teacher = given.matrix(NAME("teacher"));
  batch.gradient = given.matrix(NAME("gradient"));
  batch.want_metrics = given.at(NAME("metrics")) == Py_True;
  given.group(NAME("shape"), 2, [&](const auto& item) {
    batch.rows = PyLong_AsLongLong(item(0)), batch.classes = PyLong_AsLongLong(item(1));
  });
  given.group(NAME("top_k"), 3, [&](const auto& item) {
    batch.teacher_indices = address<const int64_t>(item(0)), batch.teacher_classes = PyLong_AsLongLong(item(1));
    batch.log_partitions = address<const double>(item(2));
  });
  given.group(NAME("labels"), 2, [&](const auto& item) {
    batch.labels = address(item(0)), batch.labels_are_int32 = item(1) == Py_True;
  });
  given.group(NAME("weights"), 2, [&](const auto& item) {
    batch.sample_weight = address(item(0)), batch.class_weight = address(item(1));
  });
  given.group(NAME("grad_output"), 2, [&](const auto& item) {
    batch.grad_output = PyFloat_AsDouble(item(0)), batch.row_grad_output = address(item(1));
  });
  RowOutputs rows;
  given.group(NAME("row_outputs"), 3,
              [&](const auto& item) { rows = {address(item(0)), address(item(1)), address(item(2))}; });
  if (PyErr_Occurred()) throw py::error_already_set();
  if (by_name.size() != kArguments.size()) given.check_names();
  Evaluation found;
  {
    py::gil_scoped_release release;
    found = evaluate(batch, isa, threads, rows);
  }
  return results(found, batch.want_metrics);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The compiled core of pydistill; use pydistill.distillation_loss.";
  watch_forks();
  py::class_<IsaVariant>(m, "Isa").def_property_readonly("name", [](const IsaVariant& isa) { return isa.name; });
  py::class_<LossOptions>(m, "Options").def(py::init(&loss_options));
  m.attr("DIVERGENCES") = names_of<Divergence>();
  m.attr("DTYPES") = names_of<DType>();
  m.attr("ISAS") = usable_isas();
  m.attr("SOURCE_HASH") = PYDISTILL_SOURCE_HASH;
  m.def("isa", &isa_named, py::return_value_policy::reference);
  m.def("usable_threads", &usable_threads);
  py::class_<GradientMemory>(m, "GradientMemory", py::buffer_protocol())
      .def(py::init<size_t>())
      .def_buffer([](GradientMemory& memory) {
        return py::buffer_info(static_cast<uint8_t*>(memory.data()), py::ssize_t(memory.bytes()));
      })
      .def_static("release", &GradientMemory::release);
  m.def("run", &run);
}
