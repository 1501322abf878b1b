// The binding of the core: converts Python's arguments, releases the GIL, calls evaluate(). It decides nothing;
// pydistill/engine/compiled.py checks and allocates. Tensors arrive as addresses, in groups: a tuple each, or
// None.
#include <pybind11/pybind11.h>

#include <array>

#include "evaluate.hpp"
#include "gradient_memory.hpp"
#include "parallel.hpp"

namespace py = pybind11;
using namespace pydistill;

namespace {

struct TopK {
  const int64_t* indices = nullptr;
  int64_t classes = 0;
  const double* log_partitions = nullptr;
};

struct Labels {
  const void* data = nullptr;
  bool are_int32 = false;
};

struct Weights {
  const void *sample = nullptr, *of_classes = nullptr;
};

struct GradOutput {
  double factor = 1;
  const void* of_rows = nullptr;
};

template <class T = void>
T* address(PyObject* number) {
  return static_cast<T*>(PyLong_AsVoidPtr(number));
}

// fill(group, item): the members of a group from its tuple; item(i) is the tuple's element.
template <class Item>
void fill(Matrix& matrix, const Item& item) {
  matrix = {address(item(0)), DType(PyLong_AsLong(item(1))), PyLong_AsLongLong(item(2))};
}
template <class Item>
void fill(TopK& top_k, const Item& item) {
  top_k = {address<const int64_t>(item(0)), PyLong_AsLongLong(item(1)), address<const double>(item(2))};
}
template <class Item>
void fill(Labels& labels, const Item& item) {
  labels = {address(item(0)), item(1) == Py_True};
}
template <class Item>
void fill(Weights& weights, const Item& item) {
  weights = {address(item(0)), address(item(1))};
}
template <class Item>
void fill(GradOutput& grad_output, const Item& item) {
  grad_output = {PyFloat_AsDouble(item(0)), address(item(1))};
}
template <class Item>
void fill(RowOutputs& rows, const Item& item) {
  rows = {address(item(0)), address(item(1)), address(item(2))};
}

template <class Group, Py_ssize_t size>
struct GroupCaster {
  PYBIND11_TYPE_CASTER(Group, py::detail::const_name("tuple | None"));
  bool load(py::handle source, bool) {
    if (source.is_none()) return true;
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != size) return false;
    fill(value, [&](Py_ssize_t i) { return PyTuple_GET_ITEM(source.ptr(), i); });
    if (PyErr_Occurred()) throw py::error_already_set();
    return true;
  }
};

// Names of an enum's values, in their order.
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

template <class T>
T option_value(const py::handle& value) {
  if constexpr (std::is_enum_v<T>) {
    const auto name = value.cast<std::string>();
    for (size_t i = 0; i < kNames<T>.size(); ++i)
      if (name == kNames<T>[i]) return T(i);
    throw py::value_error("the compiled core has no option value named " + name);
  } else {
    return value.cast<T>();
  }
}

LossOptions loss_options(const py::kwargs& values) {
  LossOptions options;
  for (const auto& [key, value] : values) {
    const auto name = key.cast<std::string>();
#define OPTION(type, option, default_value)     \
  if (name == #option) {                        \
    options.option = option_value<type>(value); \
    continue;                                   \
  }
#include "options.def"
#undef OPTION
    throw py::type_error("the compiled core has no option named " + name);
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
    if (isa.usable() && name == isa.name) return isa;
  throw py::value_error("this CPU cannot run, or the build does not have, the ISA named " + name);
}

// The results by name, or {"problem": name, "row": number} if a label or a weight is bad.
py::dict results(const Evaluation& found) {
  py::dict by_name;
  if (found.problem != Problem::none) {
    by_name["problem"] = found.problem == Problem::bad_label ? "label" : "weight";
    by_name["row"] = found.problem_row;
    return by_name;
  }
  py::dict metrics;
#define METRIC(name, rows) metrics[#name] = found.name;
#include "metrics.def"
#undef METRIC
  by_name["metrics"] = metrics;
  by_name["loss"] = found.loss;
  by_name["soft"] = found.soft;
  by_name["hard"] = found.hard;
  by_name["soft_items"] = found.soft_items;
  by_name["hard_items"] = found.hard_items;
  by_name["teacher_sums_to_one"] = found.teacher_sums_to_one;
  return by_name;
}

}  // namespace

namespace pybind11::detail {
template <>
struct type_caster<Matrix> : GroupCaster<Matrix, 3> {};
template <>
struct type_caster<TopK> : GroupCaster<TopK, 3> {};
template <>
struct type_caster<Labels> : GroupCaster<Labels, 2> {};
template <>
struct type_caster<Weights> : GroupCaster<Weights, 2> {};
template <>
struct type_caster<GradOutput> : GroupCaster<GradOutput, 2> {};
template <>
struct type_caster<RowOutputs> : GroupCaster<RowOutputs, 3> {};
}  // namespace pybind11::detail

namespace {

py::dict run(const IsaVariant& isa, int threads, const LossOptions& options, int64_t rows, int64_t classes,
             const Matrix& student, const Matrix& teacher, const TopK& top_k, const Labels& labels,
             const Weights& weights, const GradOutput& grad_output, const Matrix& gradient,
             const RowOutputs& row_outputs, bool metrics) {
  RowBatch batch;
  batch.rows = rows, batch.classes = classes;
  batch.student = student, batch.teacher = teacher, batch.gradient = gradient;
  batch.teacher_indices = top_k.indices, batch.teacher_classes = top_k.classes;
  batch.log_partitions = top_k.log_partitions;
  batch.labels = labels.data, batch.labels_are_int32 = labels.are_int32;
  batch.sample_weight = weights.sample, batch.class_weight = weights.of_classes;
  batch.options = options;
  batch.grad_output = grad_output.factor, batch.row_grad_output = grad_output.of_rows;
  batch.want_metrics = metrics;
  Evaluation found;
  {
    py::gil_scoped_release release;
    found = evaluate(batch, isa, threads, row_outputs);
  }
  return results(found);
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
  m.def("run", &run, py::arg("isa"), py::arg("threads"), py::arg("options"), py::kw_only(), py::arg("rows"),
        py::arg("classes"), py::arg("student"), py::arg("teacher"), py::arg("top_k"), py::arg("labels"),
        py::arg("weights"), py::arg("grad_output"), py::arg("gradient"), py::arg("row_outputs"),
        py::arg("metrics"));
}
