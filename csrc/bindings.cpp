// Python's view of the core: addresses and numbers in, numbers out. No decisions here;
// pydistill/engine/compiled.py allocates, this unpacks, releases the GIL and calls.
#include <pybind11/pybind11.h>

#include "evaluate.hpp"
#include "gradient_memory.hpp"
#include "parallel.hpp"

namespace py = pybind11;
using namespace pydistill;

namespace {

void* address(uintptr_t p) { return reinterpret_cast<void*>(p); }

Divergence divergence_named(const std::string& name) {
#define DIVERGENCE(entry, type) \
  if (name == #entry) return Divergence::entry;
#include "divergences.def"
#undef DIVERGENCE
  if (name == "mse") return Divergence::mse;
  if (name == "dkd") return Divergence::dkd;
  throw py::value_error("the compiled core has no divergence named " + name);
}

py::tuple divergence_names() {
  py::list names;
#define DIVERGENCE(entry, type) names.append(#entry);
#include "divergences.def"
#undef DIVERGENCE
  names.append("mse");
  names.append("dkd");
  return py::tuple(names);
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

py::tuple run(const IsaVariant& isa, int threads, const LossOptions& options, int64_t rows, int64_t classes,
              uintptr_t student, int student_dtype, int64_t student_stride, uintptr_t teacher, int teacher_dtype,
              int64_t teacher_stride, uintptr_t teacher_indices, int64_t teacher_classes, uintptr_t log_partitions,
              uintptr_t labels, bool labels_are_int32, uintptr_t sample_weight, uintptr_t class_weight,
              int reduction, double soft_items, double hard_items, double grad_output, uintptr_t row_grad_output,
              uintptr_t gradient, int64_t gradient_stride, uintptr_t row_loss, uintptr_t row_soft,
              uintptr_t row_hard, bool want_argmax) {
  RowBatch batch;
  batch.rows = rows, batch.classes = classes;
  batch.student = {address(student), DType(student_dtype), student_stride};
  batch.teacher = {address(teacher), DType(teacher_dtype), teacher_stride};
  batch.teacher_indices = static_cast<const int64_t*>(address(teacher_indices));
  batch.teacher_classes = teacher_classes;
  batch.log_partitions = static_cast<const double*>(address(log_partitions));
  batch.labels = address(labels), batch.labels_are_int32 = labels_are_int32;
  batch.sample_weight = address(sample_weight), batch.class_weight = address(class_weight);
  batch.options = options;
  batch.reduction = Reduction(reduction);
  batch.soft_items = soft_items, batch.hard_items = hard_items;
  batch.grad_output = grad_output, batch.row_grad_output = address(row_grad_output);
  batch.gradient = {address(gradient), DType(student_dtype), gradient_stride};
  batch.want_argmax = want_argmax;
  Evaluation r;
  {
    py::gil_scoped_release release;
    r = evaluate(batch, isa, threads, {address(row_loss), address(row_soft), address(row_hard)});
  }
  return py::make_tuple(int(r.problem), r.problem_row, r.loss, r.soft, r.hard, r.agreement, r.accuracy,
                        r.soft_items, r.hard_items, r.teacher_sums_to_one);
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "The compiled core of pydistill; use pydistill.distillation_loss.";
  watch_forks();
  py::class_<IsaVariant>(m, "Isa").def_property_readonly("name", [](const IsaVariant& isa) { return isa.name; });
  py::class_<LossOptions>(m, "Options")
      .def(py::init([](const std::string& divergence, double beta, double temperature, double alpha,
                       bool t_squared, int64_t ignore_index, bool distill_unlabeled, double label_smoothing) {
             return LossOptions{divergence_named(divergence),
                                beta,
                                temperature,
                                alpha,
                                t_squared,
                                ignore_index,
                                distill_unlabeled,
                                label_smoothing};
           }),
           py::kw_only(), py::arg("divergence"), py::arg("beta"), py::arg("temperature"), py::arg("alpha"),
           py::arg("t_squared"), py::arg("ignore_index"), py::arg("distill_unlabeled"),
           py::arg("label_smoothing"));
  m.attr("DIVERGENCES") = divergence_names();
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
