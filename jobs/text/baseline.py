"""The same reviews, the same split, by scikit-learn: TF-IDF of the words, and logistic regression.

``python -m jobs.text.baseline --task department``
"""

from __future__ import annotations

import argparse

import numpy as np

from .prepare import TASKS, labels, reviews, split


def main() -> None:
    """Print its accuracy with single words, and with pairs of words too."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score

    parser = argparse.ArgumentParser(prog="jobs.text.baseline", description=__doc__)
    parser.add_argument("--task", choices=tuple(TASKS), default="department")
    task = parser.parse_args().task
    train, test = split(reviews())
    answers, actual = labels(train, task), labels(test, task)
    commonest = np.bincount(answers).argmax()
    print(f"always {TASKS[task][commonest]!r}: accuracy {np.mean(actual == commonest):.4f}")
    for words in (1, 2):
        vectors = TfidfVectorizer(ngram_range=(1, words), min_df=2, sublinear_tf=True)
        model = LogisticRegression(C=10, max_iter=1000).fit(vectors.fit_transform(review.text for review in train), answers)
        predicted = model.predict(vectors.transform(review.text for review in test))
        accuracy, balanced = np.mean(predicted == actual), balanced_accuracy_score(actual, predicted)
        print(f"{'single words' if words == 1 else 'and pairs'}: accuracy {accuracy:.4f}, balanced {balanced:.4f}")


if __name__ == "__main__":
    main()
