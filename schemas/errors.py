"""Everything that can go wrong, as one tree.

PenstockError
├── RequestError                 the client can mend it
│   ├── BadRequest               400  a body that isn't what the API takes
│   ├── Unauthorized             401  no key, or none that we know
│   ├── Forbidden                403  the key's role doesn't reach this
│   ├── NotFound                 404  no such model, key or path
│   │   ├── NoAllowedRoute       404  the model is served, but nowhere that the request allows
│   │   └── AnswerNotFound       404  no such request of this key, or its answer is not here
│   ├── MethodNotAllowed         405
│   ├── RequestTimeout           408  the body didn't arrive in time
│   ├── BodyTooLarge             413
│   ├── Conflict                 409  somebody else changed it first
│   ├── AnswerNotKept            410  the request is over, but its answer is not kept any more
│   ├── RequestCancelled         410  the request was cancelled because nobody was connected to it
│   ├── IdempotencyKeyReused     422  the same Idempotency-Key with another body
│   └── BacklogFull              429  too much of this org's work waits already
├── ServiceError                 we can't serve it now
│   ├── NoLiveRoute              503  nobody serves the model at the moment
│   ├── Overloaded               503  this process is at its bound of concurrent requests
│   ├── QueueUnavailable         503  the queue can't be reached
│   ├── LogUnavailable           503  the event log can't be written, so nothing may be served
│   ├── Stopping                 503  this process ends and the drain's time is over
│   ├── QueueTimeout             504  no worker took the job in time
│   ├── FirstTokenTimeout        504  a worker took it, but nothing came
│   ├── IdleTimeout              504  the tokens stopped coming
│   ├── TotalTimeout             504  the whole took too long
│   ├── WorkerLost               502  the worker went away
│   │   ├── WorkerStalled        502  it stands still
│   │   └── WorkerYielded        502  it handed the request back
│   └── FrameGap                 502  part of the answer was lost on the way
├── Fault                        an attempt failed at its provider
│   ├── ProviderRejected         4xx  the provider says that the request is bad: passed on as it is
│   ├── ProviderAuth             502  the provider refuses our credentials
│   ├── ProviderRateLimited      429  the provider says later
│   ├── ProviderUnreachable      502  no connection
│   ├── ProviderTimeout          504  connect, first byte or idle
│   ├── ProviderFailed           502  5xx, or an error inside a 200
│   ├── ProviderNonsense         502  an answer that is not the API's
│   └── NotContinued             502  an answer that another worker began can't be gone on with
└── SetupError                   an operator can mend it: a setting, a file, a server that's too old

A class's docstring is its message when none is given; ``code`` is stable and what clients and queries match on.
The numbers are written in ingress/problems.py; here they only help to read the tree.
"""

from __future__ import annotations

from typing import ClassVar


class PenstockError(Exception):
    """Something went wrong."""

    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str | None = None, *, param: str | None = None) -> None:
        self.message = message or (type(self).__doc__ or "").strip()
        self.param = param
        super().__init__(self.message)


class RequestError(PenstockError):
    """The request can't be served as it is."""

    code = "invalid_request"


class BadRequest(RequestError):
    """The request body is not valid."""

    code = "invalid_request"


class Unauthorized(RequestError):
    """Incorrect API key provided. Send it as 'Authorization: Bearer YOUR_KEY'."""

    code = "invalid_api_key"


class Forbidden(RequestError):
    """This key's role does not allow that."""

    code = "insufficient_permissions"


class NotFound(RequestError):
    """There is nothing at this address."""

    code = "not_found"


class ModelNotFound(NotFound):
    """The model does not exist here. GET /v1/models lists those that do."""

    code = "model_not_found"


class NoAllowedRoute(NotFound):
    """No route that serves this model is allowed by the request and its key."""

    code = "no_allowed_route"

    def __init__(
        self,
        message: str | None = None,
        *,
        param: str | None = None,
        left_out: tuple[tuple[str, str, str], ...] = (),
    ) -> None:
        """*left_out* are routes, each with the model and the reason."""
        super().__init__(message, param=param)
        self.left_out = left_out


class MethodNotAllowed(RequestError):
    """This method is not allowed here."""

    code = "method_not_allowed"


class RequestTimeout(RequestError):
    """The request body did not arrive in time."""

    code = "request_timeout"


class BodyTooLarge(RequestError):
    """The request body is over the limit."""

    code = "body_too_large"


class Conflict(RequestError):
    """Somebody else changed it first; read it again and retry."""

    code = "conflict"


class AnswerNotFound(NotFound):
    """There is no such request of this key, or its answer is not kept here. It is kept for a short time, by one ingress only."""

    code = "answer_not_found"


class AnswerNotKept(RequestError):
    """This request has been served, but its answer is not kept any more. Send it again with a new Idempotency-Key."""

    code = "answer_not_kept"


class RequestCancelled(RequestError):
    """This request was cancelled, as nobody was connected to it any more. Send it again with a new Idempotency-Key."""

    code = "request_cancelled"


class IdempotencyKeyReused(RequestError):
    """This Idempotency-Key was used for another request body. Use a new key for each new request."""

    code = "idempotency_key_reused"


class BacklogFull(RequestError):
    """Too many requests of this organisation are waiting already. Retry later."""

    code = "backlog_full"
    retry_after_s: float | None = None  # as it drains


class ServiceError(PenstockError):
    """The service can't do this at the moment."""

    code = "service_unavailable"


class NoLiveRoute(ServiceError):
    """No worker serves this model at the moment."""

    code = "no_live_route"


class Overloaded(ServiceError):
    """The server is at its limit of concurrent requests. Retry shortly."""

    code = "overloaded"


class QueueUnavailable(ServiceError):
    """The job queue can't be reached at the moment. Retry shortly."""

    code = "queue_unavailable"


class LogUnavailable(ServiceError):
    """The event log can't be written at the moment, so no request can be served. Retry shortly."""

    code = "log_unavailable"


class Stopping(ServiceError):
    """The server is stopping and could wait no longer. Retry."""

    code = "stopping"


class QueueTimeout(ServiceError):
    """No worker took the request in time."""

    code = "queue_timeout"


class FirstTokenTimeout(ServiceError):
    """The worker did not answer in time."""

    code = "first_token_timeout"


class IdleTimeout(ServiceError):
    """The answer stopped coming."""

    code = "idle_timeout"


class TotalTimeout(ServiceError):
    """The request took longer than its total time-out."""

    code = "total_timeout"


class WorkerLost(ServiceError):
    """The worker that served this request went away."""

    code = "worker_lost"


class WorkerStalled(WorkerLost):
    """The worker that served this request stands still."""

    code = "worker_stalled"


class WorkerYielded(WorkerLost):
    """The worker that served this request handed it back."""

    code = "worker_yielded"


class FrameGap(ServiceError):
    """Part of the answer was lost on its way and could not be had again."""

    code = "frame_gap"


class Fault(PenstockError):
    """The provider could not serve this attempt."""

    code = "upstream_error"

    def __init__(
        self,
        message: str | None = None,
        *,
        status: int | None = None,
        type_: str | None = None,
        param: str | None = None,
        upstream_code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        """*status*, *type_* and *upstream_code* are the provider's own, where it gave any."""
        super().__init__(message, param=param)
        self.status = status
        self.type = type_
        self.upstream_code = upstream_code
        self.retry_after_s = retry_after_s
        self.tries = 1  # how often the provider was asked until this was final


class ProviderRejected(Fault):
    """The provider rejected the request."""

    code = "upstream_rejected"


class ProviderAuth(Fault):
    """The provider refused this service's credentials."""

    code = "upstream_auth"


class ProviderRateLimited(Fault):
    """The provider is limiting this service's rate. Retry later."""

    code = "upstream_rate_limited"


class ProviderUnreachable(Fault):
    """The provider can't be reached."""

    code = "upstream_unreachable"


class ProviderTimeout(Fault):
    """The provider did not answer in time."""

    code = "upstream_timeout"


class ProviderFailed(Fault):
    """The provider failed."""

    code = "upstream_error"


class ProviderNonsense(Fault):
    """The provider answered with something that is not a chat completion."""

    code = "upstream_invalid_response"


class NotContinued(Fault):
    """The answer broke off and can't be continued."""

    code = "not_continued"


class SetupError(PenstockError):
    """The setup is not valid."""

    code = "setup_error"
