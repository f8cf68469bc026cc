"""Entry point of ``python -m fhir_assets.sandbox``, which SandboxProcess starts."""

import argparse
import sys
from pathlib import Path

from fhir_assets.errors import FhirAssetsError
from fhir_assets.sandbox.fault_injection import Credentials
from fhir_assets.sandbox.faults import FaultPlan
from fhir_assets.sandbox.process import serve


def main() -> int:
    """Run the server with the command line's arguments. Returns 1, with a message, if it cannot start."""
    parser = argparse.ArgumentParser(prog="python -m fhir_assets.sandbox")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path)
    source.add_argument("--empty", action="store_true")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--faults", type=FaultPlan.model_validate_json, help="a FaultPlan as JSON")
    parser.add_argument("--end-with-stdin", action="store_true")
    parser.add_argument("--token", help="a bearer token that every request must show")
    parser.add_argument("--types-in-use", action="store_true", help="offer no other types of the catalog")
    parser.add_argument("--export-file-resources", type=int, default=10_000, help="how many a file of an export holds")
    parser.add_argument("--referential-integrity", action="store_true")
    given = parser.parse_args()
    try:
        serve(
            given.data,
            given.port,
            given.faults,
            credentials=Credentials(token=given.token) if given.token else None,
            end_with_stdin=given.end_with_stdin,
            all_types=not given.types_in_use,
            export_file_resources=given.export_file_resources,
            referential_integrity=given.referential_integrity,
        )
    except FhirAssetsError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
