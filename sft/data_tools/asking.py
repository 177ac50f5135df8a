"""What is said to a model whose reply cannot be used."""

from __future__ import annotations

from typing import Any

from rewards.endpoint import Again


def tell_fault(wish: str) -> Again:
    """Makes the next request where a reply has a fault: the model reads its reply and the fault.

    The same request again would bring the same reply: the temperature is 0.
    """

    def again(request: dict[str, Any], reply: str, fault: str) -> dict[str, Any]:
        said = {"role": "assistant", "content": reply}
        told = {"role": "user", "content": f"That cannot be used: {fault}. {wish}"}
        return {**request, "messages": [*request["messages"], said, told]}

    return again
