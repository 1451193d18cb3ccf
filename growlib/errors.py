"""The one error that growlib raises for a request that it cannot carry out."""


class GrowError(ValueError):
    """A request that growlib refuses: what was asked, what is wrong, and what would be valid."""

    def __init__(self, asked: str, wrong: str, valid: str) -> None:
        self.asked, self.wrong, self.valid = asked, wrong, valid
        super().__init__(f"{asked}: {wrong}. Valid: {valid}.")
