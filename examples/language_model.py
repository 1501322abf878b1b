"""Distil a small GPT into a smaller one from hidden states: the logits of a batch are never stored as a whole.

The text is the Python language reference, which is part of Python (pydoc_data). A teacher is trained briefly. Then one
student learns from its hidden states (LinearTeacher), one from its cached top-k outputs, and one from the text alone.
Run it with `python examples/language_model.py`. It takes about 40 seconds on two cores and prints the cross-entropy on
unseen paragraphs, in nats per token:

    teacher                       3.672
    student, LinearTeacher        4.275
    student, cached top-k targets 4.381
    student, the text alone       4.393
"""

import re
from collections import Counter
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F

import pydistill

WORDS, LENGTH, PAD = 2000, 40, -100
OPTIONS = {"temperature": 1.5, "alpha": 0.7}


class GPT(torch.nn.Module):
    """A causal transformer that returns its last hidden states; ``embed.weight`` is also the weight of its head."""

    def __init__(self, width, layers):
        super().__init__()
        self.embed = torch.nn.Embedding(WORDS, width)
        torch.nn.init.normal_(self.embed.weight, std=width**-0.5)
        self.position = torch.nn.Parameter(0.02 * torch.randn(LENGTH, width))
        layer = torch.nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = torch.nn.LayerNorm(width)

    def forward(self, tokens):
        """Hidden states ``(rows, length, width)`` of tokens ``(rows, length)``."""
        length = tokens.shape[1]
        causal = torch.nn.Transformer.generate_square_subsequent_mask(length)
        hidden = self.embed(tokens) * self.embed.embedding_dim**0.5 + self.position[:length]
        return self.norm(self.layers(hidden, mask=causal, is_causal=True))


def paragraphs():
    """The text as token ids, one tensor per paragraph of more than 8 words; id 0 stands for all rare words."""
    texts = [re.findall(r"\w+|[^\w\s]", part) for topic in topics.values() for part in topic.split("\n\n")]
    texts = [words[: LENGTH + 1] for words in texts if len(words) > 8]
    common = Counter(word for words in texts for word in words).most_common(WORDS - 1)
    number = {word: k + 1 for k, (word, _) in enumerate(common)}
    return [torch.tensor([number.get(word, 0) for word in words]) for words in texts]


def make_batch(texts):
    """Padded ``(tokens, labels)``. The labels are already shifted: the label of a token is the next token."""
    tokens = torch.nn.utils.rnn.pad_sequence([text[:-1] for text in texts], batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence([text[1:] for text in texts], batch_first=True, padding_value=PAD)
    return tokens, labels


def linear_teacher(teacher, tokens):
    """The teacher's outputs for a batch as hidden states: H numbers per token instead of C logits."""
    with torch.no_grad():
        return pydistill.LinearTeacher(teacher(tokens), teacher.embed.weight)


def cached_targets(teacher, batches, k=32):
    """The k largest logits of the teacher per token, computed once and reused in every epoch."""
    temperatures = (OPTIONS["temperature"],)
    with torch.no_grad():
        logits = (F.linear(teacher(tokens), teacher.embed.weight) for tokens, _ in batches)
        return [pydistill.top_k(x, k, temperatures=temperatures, tail="bucket") for x in logits]


def train(model, batches, epochs, targets=None, micro_batches=2):
    """Train with AdamW. ``targets(i)`` returns the teacher of batch i; without it, the model learns the text alone."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    options = OPTIONS if targets else {"alpha": 0.0}
    for _ in range(epochs):
        for i in torch.randperm(len(batches)).tolist():
            tokens, labels = batches[i]
            teacher = targets(i) if targets else None
            num_items = int((labels != PAD).sum())  # of the whole batch, so that the losses of its micro-batches add up
            for rows in torch.arange(len(tokens)).chunk(micro_batches):
                loss = pydistill.linear_distillation_loss(
                    model(tokens[rows]),
                    model.embed.weight,
                    teacher[rows] if targets else None,
                    labels[rows],
                    num_items=num_items,
                    **options,
                )
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()


@torch.no_grad()
def cross_entropy(model, batches):
    """Cross-entropy of the model in nats per token."""
    losses = [
        pydistill.linear_distillation_loss(model(tokens), model.embed.weight, None, labels, alpha=0.0, reduction="sum")
        for tokens, labels in batches
    ]
    return float(sum(losses)) / sum(int((labels != PAD).sum()) for _, labels in batches)


def eager_loss(hidden, weight, teacher_hidden, teacher_weight, labels):
    """The same loss in plain torch, with all logits in memory."""
    T, alpha, counts = OPTIONS["temperature"], OPTIONS["alpha"], labels != PAD
    student, teacher = F.linear(hidden, weight)[counts], F.linear(teacher_hidden, teacher_weight)[counts]
    log_q, log_p = F.log_softmax(student / T, -1), F.log_softmax(teacher / T, -1)
    soft = T**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    return alpha * soft + (1 - alpha) * F.cross_entropy(student, labels[counts])


def main(texts=None, teacher_epochs=3, epochs=2):
    """Train the teacher and three students; returns their cross-entropies on unseen text."""
    torch.manual_seed(0)
    texts = paragraphs() if texts is None else texts
    texts = [texts[i] for i in torch.randperm(len(texts))[:1500]]
    unseen, seen = texts[: len(texts) // 10], texts[len(texts) // 10 :]
    batches = [make_batch(seen[i : i + 32]) for i in range(0, len(seen) - 31, 32)]
    test = [make_batch(unseen[i : i + 32]) for i in range(0, len(unseen), 32)]

    teacher = GPT(width=96, layers=2)
    train(teacher, batches, teacher_epochs)
    results = {"teacher": cross_entropy(teacher, test)}
    print(f"teacher                       {results['teacher']:.3f}", flush=True)
    cache = cached_targets(teacher, batches)
    students = {
        "student, LinearTeacher": lambda i: linear_teacher(teacher, batches[i][0]),
        "student, cached top-k targets": lambda i: cache[i],
        "student, the text alone": None,
    }
    for name, targets in students.items():
        torch.manual_seed(1)
        student = GPT(width=48, layers=1)
        train(student, batches, epochs, targets)
        results[name] = cross_entropy(student, test)
        print(f"{name:30}{results[name]:.3f}", flush=True)
    return results


if __name__ == "__main__":
    main()
