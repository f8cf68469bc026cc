"""Entry point of ``python -m fhir_assets.sandbox``, which SandboxProcess starts."""

import argparse
import sys
from pathlib import Path

from fhir_assets.errors import FhirAssetsError
from fhir_assets.file_modes import restrict_umask
from fhir_assets.sandbox.fault_injection import Credentials
from fhir_assets.sandbox.faults import FaultPlan
from fhir_assets.sandbox.process import serve


def main() -> int:
    """Run the server with the arguments of the command line. Return 1, after an error message, if it cannot start."""
    restrict_umask()
    parser = argparse.ArgumentParser(prog="python -m fhir_assets.sandbox")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path)
    source.add_argument("--empty", action="store_true")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--faults", type=FaultPlan.model_validate_json, help="a FaultPlan as JSON")
    parser.add_argument("--end-with-stdin", action="store_true")
    parser.add_argument("--token", help="a bearer token that every request must carry")
    parser.add_argument("--types-in-use", action="store_true", help="support only the resource types of the data")
    parser.add_argument(
        "--export-file-resources", type=int, default=10_000, help="maximum resources in a file of an export"
    )
    parser.add_argument("--referential-integrity", action="store_true")
    arguments = parser.parse_args()
    try:
        serve(
            arguments.data,
            arguments.port,
            arguments.faults,
            credentials=Credentials(token=arguments.token) if arguments.token else None,
            end_with_stdin=arguments.end_with_stdin,
            all_types=not arguments.types_in_use,
            export_file_resources=arguments.export_file_resources,
            referential_integrity=arguments.referential_integrity,
        )
    except FhirAssetsError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
