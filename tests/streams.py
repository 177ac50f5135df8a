"""A fake sampler's `stream`, made of its `sample`."""

from __future__ import annotations

from internvl.errors import DataError


class Streams:
    """One request at a time; an image that cannot be decoded is that request's answer."""

    def stream(self, requests, config, *, ahead=None):
        for number, request in enumerate(requests):
            try:
                list(request.images)
                (answer,) = self.sample([request], config)
            except DataError as error:
                yield number, error
            else:
                yield number, answer
