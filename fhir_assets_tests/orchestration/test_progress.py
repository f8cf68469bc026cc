"""Progress of a source reaches the run that waits for it, and no other."""

import threading

from fhir_assets.steps.progress import ProgressRelay


def test_a_text_reaches_the_receiver_of_the_block() -> None:
    relay = ProgressRelay()
    received: list[str] = []
    relay("before")
    with relay.send_to(received.append):
        relay("during")
    relay("after")
    assert received == ["during"]


def test_two_runs_at_once_receive_their_own_texts() -> None:
    relay = ProgressRelay()
    both_listen = threading.Barrier(2, timeout=10)
    received: dict[str, list[str]] = {"a": [], "b": []}

    def run(name: str) -> None:
        with relay.send_to(received[name].append):
            both_listen.wait()
            relay(f"progress of {name}")
            both_listen.wait()

    threads = [threading.Thread(target=run, args=(name,)) for name in received]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert received == {"a": ["progress of a"], "b": ["progress of b"]}
