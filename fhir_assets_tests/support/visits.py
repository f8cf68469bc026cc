"""Rows of visits as a hospital posts them or writes them to CSV."""

Row = dict[str, str]
"""Cells by column name."""


def visit(mrn: str, account: str, last: str = "Lovelace", *, day: str = "2024-01-05", reason: str = "") -> Row:
    """Return a visit of the patient with the medical record number ``mrn``."""
    return {
        "mrn": mrn,
        "first_name": "Ada",
        "last_name": last,
        "birth_date": "1815-12-10",
        "visit_account_number": account,
        "visit_date": day,
        "reason": reason,
    }
