"""A fuzzer of every public loss function: random calls against a reference in long double.

``python -m tests.fuzz_loss --seed 1 --seconds 60`` from the root of the checkout; a failing call is made smaller and
printed as code. One module per idea:

- case: a call as data, which can be run, changed, and written as code;
- drawing: random calls;
- running: a call, on the package;
- definitions: each divergence, the table that the tests' float64 reference uses too;
- divergences: the soft term and its gradient in long double;
- logits: of student and teacher in long double, from whatever form they are given in;
- expectation: what a call must give, and how far from it a correct result may be;
- judging: what is wrong with a result;
- refusals: calls that must be refused;
- shrinking: the smallest call that still fails;
- campaign: many calls, in a process that may crash.
"""
