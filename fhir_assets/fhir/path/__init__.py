"""A compiler from FHIRPath (http://hl7.org/fhirpath/N1) to Python functions, used by views and invariants.

An expression passes through the modules in this order: ``syntax`` parses its text, ``resolver`` turns the syntax tree
into typed expressions, and these write Python source through the ``emitter``. Generated code calls ``runtime``,
``equality``, ``date_times`` and ``scalar_functions``.
"""

from fhir_assets.fhir.path.compiler import CompiledPath, compile_path
from fhir_assets.fhir.path.expressions import Constant

__all__ = ["CompiledPath", "Constant", "compile_path"]
