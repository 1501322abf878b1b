"""Distil a forest within scikit-learn: a Pipeline on digits, and a GridSearchCV over temperature and alpha.

The forest is fitted once per fold of the search; each candidate's student learns from its out-of-fold probabilities. A
forest's probabilities are already soft: here, a higher temperature lowers the accuracy. Run it with
`python examples/sklearn_pipeline.py`. It takes about 30 seconds on two cores and prints the mean accuracy over 3 folds
of the training rows, then the figures on the test rows:

    the labels alone          0.963
                              T = 1  T = 2  T = 4
    alpha = 0.3               0.971  0.967  0.944
    alpha = 0.7               0.959  0.949  0.910
    chosen: alpha = 0.3, T = 1; on 540 new rows:
    teacher's accuracy        0.969
    student's accuracy        0.980
    agreement                 0.961
    bytes, teacher / student  237
"""

import tempfile

import numpy as np
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from pydistill.sklearn import DistilledClassifier

TEMPERATURES = [1.0, 2.0, 4.0]
ALPHAS = [0.3, 0.7]


def make_search(folder, trees):
    """The search. All candidates of a fold have the same teacher: with ``memory`` it is fitted once per fold."""
    student = DistilledClassifier(
        RandomForestClassifier(trees), hidden_layer_sizes=(32,), epochs=30, memory=folder, random_state=0
    )
    pipeline = Pipeline([("scale", StandardScaler()), ("student", student)])
    labels_alone = {"student__alpha": [0.0]}
    grid = [labels_alone, {"student__alpha": ALPHAS, "student__temperature": TEMPERATURES}]
    return GridSearchCV(pipeline, grid, cv=3)


def print_table(search):
    """Print the mean accuracy over the folds, one line per alpha and one column per temperature."""
    labels_alone, *means = search.cv_results_["mean_test_score"]
    print(f"the labels alone          {labels_alone:.3f}")
    print("                          " + "  ".join(f"T = {t:g}" for t in TEMPERATURES))
    for alpha, row in zip(ALPHAS, np.reshape(means, (len(ALPHAS), -1)), strict=True):
        print(f"alpha = {alpha:<17g} " + "  ".join(f"{mean:.3f}" for mean in row))


def main(trees=50):
    """Search, then measure on rows that were not used in the search; returns the figures."""
    X, y = load_digits(return_X_y=True)
    X, X_test, y, y_test = train_test_split(X, y, test_size=0.3, stratify=y, random_state=0)
    with tempfile.TemporaryDirectory() as folder:
        search = make_search(folder, trees).fit(X, y)
    print_table(search)

    scaled = search.best_estimator_["scale"].transform(X_test)
    student = search.best_estimator_["student"]
    results = {
        "temperature": student.temperature,
        "alpha": student.alpha,
        "teacher": student.teacher_.score(scaled, y_test),
        "student": search.score(X_test, y_test),
        "agreement": float(np.mean(student.predict(scaled) == student.teacher_.predict(scaled))),
        "compression": student.compression_,
    }
    print(f"chosen: alpha = {results['alpha']:g}, T = {results['temperature']:g}; on {len(y_test)} new rows:")
    print(f"teacher's accuracy        {results['teacher']:.3f}")
    print(f"student's accuracy        {results['student']:.3f}")
    print(f"agreement                 {results['agreement']:.3f}")
    print(f"bytes, teacher / student  {results['compression']:.0f}")
    return results


if __name__ == "__main__":
    main()
