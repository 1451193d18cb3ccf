"""The one error that growlib raises for a request that it cannot carry out."""


class GrowError(ValueError):
    """A request that growlib refuses: what was asked, what is wrong, and what would be valid."""

    def __init__(self, asked: str, wrong: str, valid: str) -> None:
        super().__init__(asked, wrong, valid)  # all three, so that the error survives pickling between processes
        self.asked, self.wrong, self.valid = asked, wrong, valid

    def __str__(self) -> str:
        return f"{self.asked}: {self.wrong}. Valid: {self.valid}."
