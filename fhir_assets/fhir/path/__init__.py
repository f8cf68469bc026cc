"""FHIRPath, compiled to Python functions. Serves the views and the invariants alike."""

from fhir_assets.fhir.path.compiled import CompiledPath, compile_path
from fhir_assets.fhir.path.nodes import Constant

__all__ = ["CompiledPath", "Constant", "compile_path"]
