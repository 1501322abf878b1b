"""DistilBERT's loss for a masked language model: soft targets, labels, and the cosine distance of the hidden states.

The first two terms are one fused call; the third is torch's. The models are tiny transformers, trained on digits of pi,
so that the example runs in seconds: `python examples/distilbert_loss.py`
"""

import torch
import torch.nn.functional as F

import pydistill

TEXT = "31415926535897932384626433832795028841971693993751058209749445923078164062862089986280348253421170679" * 8
MASK, VOCABULARY, LENGTH = 10, 11, 16


class Model(torch.nn.Module):
    """A transformer encoder that returns logits and its last hidden states."""

    def __init__(self, layers, width=32):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, width)
        self.position = torch.nn.Parameter(0.1 * torch.randn(LENGTH, width))
        layer = torch.nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, layers)
        self.head = torch.nn.Linear(width, VOCABULARY)

    def forward(self, tokens):
        """Logits and last hidden states of ``(rows, length)`` tokens."""
        hidden = self.encoder(self.embed(tokens) + self.position)
        return self.head(hidden), hidden


def masked_batch(rows):
    """Tokens of which a sixth is masked, and labels: the original token if it is masked, else -100 (ignored)."""
    start = torch.randint(len(TEXT) - LENGTH, (rows,))
    tokens = torch.tensor([[int(c) for c in TEXT[i : i + LENGTH]] for i in start])
    hidden = torch.rand(tokens.shape) < 1 / 6
    return tokens.masked_fill(hidden, MASK), tokens.masked_fill(~hidden, -100)


def distilbert_loss(student, teacher, tokens, labels):
    """5 T^2 KL + 2 CE + 1 cosine. In the fused call, alpha is the share of the soft term: 5 / (5 + 2)."""
    logits, hidden = student(tokens)
    with torch.no_grad():
        teacher_logits, teacher_hidden = teacher(tokens)
    fused = 7 * pydistill.distillation_loss(
        logits, teacher_logits, labels, temperature=2.0, alpha=5 / 7, unlabeled="distill"
    )
    same = torch.ones(tokens.numel())
    cosine = F.cosine_embedding_loss(hidden.flatten(0, 1), teacher_hidden.flatten(0, 1), same)
    return fused + cosine, cosine


def main(steps=150):
    """Train a teacher, then distil it; returns the loss and its cosine term for every step."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    teacher, student = Model(layers=3), Model(layers=1)
    optimizer = torch.optim.Adam(teacher.parameters(), 3e-3)
    for _ in range(steps):
        tokens, labels = masked_batch(32)
        loss = F.cross_entropy(teacher(tokens)[0].flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)
    history = []
    for _ in range(steps):
        loss, cosine = distilbert_loss(student, teacher, *masked_batch(32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append((float(loss.detach()), float(cosine.detach())))
    first, last = history[0], history[-1]
    print(f"loss {first[0]:.3f} -> {last[0]:.3f}, of which the cosine term {first[1]:.3f} -> {last[1]:.3f}")
    return history


if __name__ == "__main__":
    main()
