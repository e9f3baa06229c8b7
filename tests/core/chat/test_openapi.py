"""Whatever its own description lets one ask, the server answers, and never with an error of its own."""

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

OPERATIONS = ["GET /health", "GET /metrics", "GET /v1/models", "GET /v1/models/{model}",
              "POST /v1/chat/completions", "POST /v1/completions"]  # fmt: skip
EXAMPLES = 40  # of each operation


def test_the_description_names_every_way_in(running) -> None:
    described = running(token="k").get("/openapi.json").json()
    found = [f"{method.upper()} {path}" for path, item in described["paths"].items() for method in item]
    assert sorted(found) == sorted(OPERATIONS)
    for path, item in described["paths"].items():
        for operation in item.values():
            assert "422" not in operation["responses"] and (path == "/health" or "security" in operation)


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_nothing_that_can_be_asked_breaks_the_server(running, operation: str) -> None:
    import schemathesis
    from schemathesis import GenerationMode
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

    client: httpx.Client = running(token="secret", seconds=5)
    method, path = operation.split()
    described = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")
    checks = [not_a_server_error, status_code_conformance, content_type_conformance]
    # Without parameters or a body there is nothing to get wrong.
    modes = list(GenerationMode) if method == "POST" else [GenerationMode.POSITIVE]
    answers: set[int] = set()

    examples = EXAMPLES if method == "POST" else 5

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(data=st.data())
    def ask(data: st.DataObject) -> None:
        mode = data.draw(st.sampled_from(modes))
        case = data.draw(described[path][method].as_strategy(generation_mode=mode))
        answer = case.call(headers={"Authorization": "Bearer secret"})
        case.validate_response(answer, checks=checks)
        answers.add(answer.status_code)

    ask()
    assert answers
