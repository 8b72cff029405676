"""Text without labels, dealt out by what it is about."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from datasets import Dataset
from flwr_datasets.partitioner import DirichletPartitioner, Partitioner

from records import files

VOCABULARY = 10_000  # the commonest words; the others count for nothing

NAMED = 3  # words in a cluster's name

STEM = 4  # letters that begin two forms of one word


class ClusterPartitioner(Partitioner):
    """Clusters of records, dealt out as Flower's `DirichletPartitioner` deals out labels.

    The method is FedNLP's (arXiv 2104.08815, feature clustering), with TF-IDF in the place of
    a sentence encoder, which would have to be downloaded. `columns`: the text columns, by any
    names; None stands for none. Of conversations they are the last questions and answers.
    `alpha`, `min_partition_size`, `seed`: as in `DirichletPartitioner`; `seed` decides the
    clusters as well.

    A partition has one column more, `cluster`: the cluster's number and the words that are
    heavier in it than elsewhere.
    """

    def __init__(
        self,
        num_partitions: int,
        columns: dict[str, str | None],
        num_clusters: int,
        alpha: float,
        min_partition_size: int = 10,
        seed: int = 0,
    ) -> None:
        super().__init__()
        texts = [column for name, column in columns.items() if name != "messages"]
        self.columns = [column for column in texts if column]
        self.settings = {"num_clusters": num_clusters, "seed": seed}
        self.dealer = DirichletPartitioner(
            num_partitions, "cluster", alpha, min_partition_size, seed=seed
        )

    def load_partition(self, partition_id: int) -> Dataset:
        """One client's records. Raises `ValueError` where they cannot be dealt out so."""
        return self._dealt().load_partition(partition_id)

    @property
    def num_partitions(self) -> int:
        return self._dealt().num_partitions

    def _dealt(self) -> DirichletPartitioner:
        if not self.dealer.is_dataset_assigned():
            # Hugging Face Datasets keeps the outcome on disk: one process does the work.
            self.dealer.dataset = self.dataset.map(
                cluster,
                batched=True,
                batch_size=None,
                input_columns=self.columns,
                fn_kwargs=self.settings,
            )
        return self.dealer


def cluster(*columns: list[Any], num_clusters: int, seed: int) -> dict[str, list[str]]:
    """The cluster of each record, by k-means on the TF-IDF of its words.

    Each of `columns` has one text for each record. English stop words do not count. Raises
    `ValueError` for fewer records than clusters, or no words at all.
    """
    # Here, because a second or two is theirs, and only one process needs them.
    from sklearn.cluster import KMeans
    from sklearn.feature_extraction.text import TfidfVectorizer
    from threadpoolctl import threadpool_limits

    texts = ["\n".join(map(files.text, row)) for row in zip(*columns, strict=True)]
    tfidf = TfidfVectorizer(
        stop_words="english", sublinear_tf=True, max_features=VOCABULARY
    )
    vectors = tfidf.fit_transform(texts)
    # One thread: the order of sums, and so the clusters, would hang on their number.
    with threadpool_limits(1):
        found = KMeans(num_clusters, random_state=seed).fit(vectors)
    words = tfidf.get_feature_names_out()
    # What all records share (an instruction's words, say) is no heavier here than anywhere.
    apart = found.cluster_centers_ - np.asarray(vectors.mean(axis=0))
    names: list[str] = []
    for number, centre in enumerate(apart):
        heaviest = (words[i] for i in centre.argsort()[::-1] if centre[i] > 0)
        names.append(f"{number}: {' '.join(_unlike(heaviest, NAMED))}".rstrip())
    return {"cluster": [names[label] for label in found.labels_]}


def _unlike(words: Iterable[str], count: int) -> list[str]:
    """The first so many words that are no other form of one before: cause, causes, caused."""
    chosen: list[str] = []
    for word in words:
        if len(chosen) == count:
            break
        if word[:STEM] not in (known[:STEM] for known in chosen):
            chosen.append(word)
    return chosen
