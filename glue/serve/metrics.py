"""What a server counts, as text for Prometheus."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Metrics:
    """Sums since the start, and functions that tell what is so now."""

    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    prompt_tokens: int = 0
    completion_tokens: int = 0
    now: dict[str, tuple[str, Callable[[], int]]] = field(default_factory=dict)

    def request(self, route: str, status: int, seconds: float) -> None:
        """One request was answered."""
        self.requests[route, status] += 1
        self.seconds[route] += seconds

    def tokens(self, read: int, written: int) -> None:
        """One text was gone on with."""
        self.prompt_tokens += read
        self.completion_tokens += written

    def text(self) -> str:
        """In the form that Prometheus reads."""
        lines = ["# HELP glue_requests_total Requests answered.", "# TYPE glue_requests_total counter"]
        lines += [f'glue_requests_total{{route="{route}",status="{status}"}} {count}'
                  for (route, status), count in sorted(self.requests.items())]
        lines += ["# HELP glue_request_seconds Time from a request to the end of its answer.",
                  "# TYPE glue_request_seconds summary"]
        for route, sum_ in sorted(self.seconds.items()):
            count = sum(number for (known, _), number in self.requests.items() if known == route)
            lines += [f'glue_request_seconds_sum{{route="{route}"}} {sum_:.6f}',
                      f'glue_request_seconds_count{{route="{route}"}} {count}']
        lines += ["# HELP glue_tokens_total Tokens read and written.", "# TYPE glue_tokens_total counter",
                  f'glue_tokens_total{{kind="prompt"}} {self.prompt_tokens}',
                  f'glue_tokens_total{{kind="completion"}} {self.completion_tokens}']
        for name, (what, value) in self.now.items():
            lines += [f"# HELP glue_{name} {what}", f"# TYPE glue_{name} gauge", f"glue_{name} {value()}"]
        return "\n".join(lines) + "\n"
