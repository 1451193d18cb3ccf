"""The papers that the methods are from, as BibTeX."""

from collections.abc import Iterable
from typing import NamedTuple


class Paper(NamedTuple):
    """A published source."""

    name: str  # what the field calls the method
    authors: str
    title: str
    venue: str
    year: int
    arxiv: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({f'arXiv {self.arxiv}' if self.arxiv else f'{self.venue} {self.year}'})"

    def bibtex(self) -> str:
        """One entry; its key is the arXiv number, or the name."""
        fields = {"title": f"{{{self.title}}}", "author": self.authors.replace(" et al.", " and others")}
        fields |= {"year": str(self.year)} | ({"note": self.venue} if self.venue else {})
        fields |= {"eprint": self.arxiv, "archiveprefix": "arXiv"} if self.arxiv else {}
        lines = ",\n".join(f"  {field} = {{{value}}}" for field, value in fields.items() if value)
        return f"@misc{{{'arxiv:' + self.arxiv if self.arxiv else self.name.lower()},\n{lines},\n}}"


def bibtex(papers: Iterable[Paper]) -> str:
    """All entries, each once."""
    return "\n\n".join(paper.bibtex() for paper in dict.fromkeys(papers))


BERT2BERT = Paper(
    "bert2BERT", "Chen et al.", "bert2BERT: Towards Reusable Pretrained Language Models", "ACL", 2022, "2110.07143"
)
LEMON = Paper("LEMON", "Wang et al.", "LEMON: Lossless Model Expansion", "ICLR", 2024, "2310.07999")
LIGO = Paper(
    "LiGO", "Wang et al.", "Learning to Grow Pretrained Models for Efficient Transformer Training", "ICLR", 2023,
    "2303.00980",
)  # fmt: skip
LLAMA_PRO = Paper(
    "LLaMA-Pro", "Wu et al.", "LLaMA Pro: Progressive LLaMA with Block Expansion", "ACL", 2024, "2401.02415"
)
