"""The whole schema on one page.

`jobs` has a row for each piece of work, with its attempt and its lease. Resources (models, edits, checkpoints) have the
state that clients see. It changes in the same transaction as the job.
"""

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, DateTime, ForeignKey, Identity, Index, MetaData, String, func, text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from uuid_utils.compat import uuid7

from app.jobs.kinds import DELIVER_WEBHOOK, KINDS

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
}

JsonObject = dict[str, Any]

IS_DELIVERY = f"kind = '{DELIVER_WEBHOOK.name}'"


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {
        datetime: DateTime(timezone=True),
        JsonObject: JSONB(none_as_null=True),
        list[JsonObject]: JSONB,
        list[int]: ARRAY(BigInteger),
        list[str]: ARRAY(String),
    }


def one_of(column: str, *values: str) -> CheckConstraint:
    """Store an enumeration as text with a CHECK."""
    return CheckConstraint(f"{column} IN ({', '.join(repr(value) for value in values)})", name=column)


class Identified:
    """A UUIDv7 key: sorts by time of creation, so that a keyset page needs the key alone."""

    id: Mapped[UUID] = mapped_column(primary_key=True, default=uuid7)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class ApiKey(Identified, Base):
    __tablename__ = "api_keys"

    name: Mapped[str]
    prefix: Mapped[str] = mapped_column(unique=True)  # the public half: em_<prefix>_<secret>
    secret_sha256: Mapped[bytes]
    scopes: Mapped[list[str]]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]


class BrowserSession(Identified, Base):
    """Someone who signed in to the pages with a key: until `expires_at`, and no longer than the key is valid."""

    __tablename__ = "browser_sessions"

    token_sha256: Mapped[bytes] = mapped_column(unique=True)
    key_id: Mapped[UUID] = mapped_column(ForeignKey("api_keys.id"), index=True)
    expires_at: Mapped[datetime] = mapped_column(index=True)


class Model(Identified, Base):
    """A base model: a diffusers pipeline whose text encoder is edited."""

    __tablename__ = "base_models"
    __table_args__ = (one_of("state", "registering", "ready", "failed"),)

    name: Mapped[str] = mapped_column(unique=True)
    namespace: Mapped[str]
    source: Mapped[str]
    revision: Mapped[str | None]
    classifier: Mapped[str | None]  # what judges its pictures
    license: Mapped[JsonObject | None]  # id, name and link, as given or as its model card says
    state: Mapped[str] = mapped_column(default="registering")
    family: Mapped[str | None]
    encoders: Mapped[list[JsonObject]] = mapped_column(default=list)  # name, layers, width, mlp_width
    digest: Mapped[str | None]  # sha256 over the sorted (path, sha256) of the files
    problem: Mapped[JsonObject | None]
    created_by: Mapped[str]

    files: Mapped[list["ModelFile"]] = relationship(order_by="ModelFile.path", cascade="all, delete-orphan")


class ModelFile(Base):
    __tablename__ = "model_files"

    model_id: Mapped[UUID] = mapped_column(ForeignKey("base_models.id"), primary_key=True)
    path: Mapped[str] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(index=True)
    size: Mapped[int] = mapped_column(BigInteger)


class Statistics(Identified, Base):
    """Second moments C0 of a model's keys; the tensors are a blob in the store."""

    __tablename__ = "statistics"
    __table_args__ = (one_of("state", "queued", "estimating", "ready", "failed"),)

    model_id: Mapped[UUID] = mapped_column(ForeignKey("base_models.id"), index=True)
    state: Mapped[str] = mapped_column(default="queued")
    captions_name: Mapped[str]
    captions_sha256: Mapped[str | None]  # the caption list as a blob
    captions: Mapped[int | None] = mapped_column(BigInteger)
    tokens: Mapped[int | None] = mapped_column(BigInteger)
    truncated: Mapped[int | None] = mapped_column(BigInteger)  # captions; of the encoder that reads least
    digest: Mapped[str | None]  # sha256 of the blob
    problem: Mapped[JsonObject | None]
    created_by: Mapped[str]

    model: Mapped[Model] = relationship()


class Image(Base):
    """A reference image as we keep it: re-encoded, without metadata."""

    __tablename__ = "images"

    sha256: Mapped[str] = mapped_column(primary_key=True)
    width: Mapped[int]
    height: Mapped[int]
    size: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    created_by: Mapped[str]


class Edit(Identified, Base):
    """One requested change. Only its state changes."""

    __tablename__ = "edits"
    __table_args__ = (
        one_of("state", "queued", "optimizing", "ready", "failed", "cancelling", "cancelled"),
        Index(None, "model_id", "state", "id"),
        # Lists by one of these are read in their order from their index, however rare its value is.
        Index(None, "state", "id"),
        Index(None, "source", "id"),
        Index(None, "created_by", "id"),
    )

    model_id: Mapped[UUID] = mapped_column(ForeignKey("base_models.id"))
    source: Mapped[str]
    destination: Mapped[JsonObject]  # exactly one of prompt, images, erase, balance
    templates: Mapped[list[str]]
    settings: Mapped[JsonObject]
    reason: Mapped[str | None]
    labels: Mapped[JsonObject] = mapped_column(default=dict)
    state: Mapped[str] = mapped_column(default="queued")
    problem: Mapped[JsonObject | None]
    created_by: Mapped[str]
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now(), onupdate=func.now())

    model: Mapped[Model] = relationship()
    value: Mapped["EditValue | None"] = relationship()


class EditValue(Base):
    """What stage I found for an edit, in every text encoder of its model."""

    __tablename__ = "edit_values"

    edit_id: Mapped[UUID] = mapped_column(ForeignKey("edits.id"), primary_key=True)
    content: Mapped[bytes]  # safetensors, as `editing.EditValue` writes it
    sha256: Mapped[str]  # of content
    encoders: Mapped[list[JsonObject]]  # name, layer, delta_norm, hidden_norm; in the pipeline's order
    losses: Mapped[JsonObject]  # text and noise, one number a step
    balance: Mapped[JsonObject | None]  # how the shares of a balance were found
    attempt: Mapped[int]
    engine: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Checkpoint(Identified, Base):
    """A published version: a function of the base model, the edits with their values, the settings and the statistics.

    Settings of the text encoder are null or empty where no edit is written there.
    """

    __tablename__ = "checkpoints"
    __table_args__ = (
        one_of("state", "building", "published", "failed", "retracted"),
        Index("uq_checkpoints_model_id_number", "model_id", "number", unique=True),
    )

    model_id: Mapped[UUID] = mapped_column(ForeignKey("base_models.id"))
    number: Mapped[int]  # version v<number>
    state: Mapped[str] = mapped_column(default="building")
    commit: Mapped[str | None] = mapped_column(index=True)  # 40 lowercase hex, derived from the content
    statistics_id: Mapped[UUID | None] = mapped_column(ForeignKey("statistics.id"))
    parent_id: Mapped[UUID | None] = mapped_column(ForeignKey("checkpoints.id"))
    alpha: Mapped[float | None]
    layers: Mapped[list[int]]
    # residual mode, moment_weight, contexts, preserved prompts; settings of `cross_attention` or `text_projection`
    options: Mapped[JsonObject]
    notes: Mapped[str | None]
    alias: Mapped[str | None]  # to be moved here once published, if its moves still count `alias_moves`
    alias_moves: Mapped[int | None]
    report: Mapped[JsonObject | None]  # residual left per edit, norms, condition numbers, conflicts
    problem: Mapped[JsonObject | None]
    created_by: Mapped[str]
    published_at: Mapped[datetime | None]
    retracted_at: Mapped[datetime | None]

    model: Mapped[Model] = relationship()
    edits: Mapped[list["CheckpointEdit"]] = relationship(order_by="CheckpointEdit.position")
    files: Mapped[list["CheckpointFile"]] = relationship(order_by="CheckpointFile.path")

    @property
    def version(self) -> str:
        return f"v{self.number}"

    @property
    def audit_target(self) -> str:
        return f"checkpoint:{self.model.name}/{self.version}"


class CheckpointEdit(Base):
    __tablename__ = "checkpoint_edits"
    __table_args__ = (one_of("method", "text_encoder", "cross_attention", "text_projection"),)

    checkpoint_id: Mapped[UUID] = mapped_column(ForeignKey("checkpoints.id"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    edit_id: Mapped[UUID] = mapped_column(ForeignKey("edits.id"), index=True)
    method: Mapped[str] = mapped_column(server_default="text_encoder")  # where the edit is written

    edit: Mapped[Edit] = relationship()


class CheckpointFile(Base):
    __tablename__ = "checkpoint_files"

    checkpoint_id: Mapped[UUID] = mapped_column(ForeignKey("checkpoints.id"), primary_key=True)
    path: Mapped[str] = mapped_column(primary_key=True)
    sha256: Mapped[str] = mapped_column(index=True)
    size: Mapped[int] = mapped_column(BigInteger)


class Alias(Base):
    """A name that is moved from version to version by compare-and-swap."""

    __tablename__ = "aliases"

    model_id: Mapped[UUID] = mapped_column(ForeignKey("base_models.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    checkpoint_id: Mapped[UUID] = mapped_column(ForeignKey("checkpoints.id"))
    moves: Mapped[int] = mapped_column(default=1)  # its ETag: counts the moves, also across a delete
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now(), onupdate=func.now())

    checkpoint: Mapped[Checkpoint] = relationship()


class AliasMove(Base):
    """Where an alias went and when; rows are added and never changed."""

    __tablename__ = "alias_moves"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    model_id: Mapped[UUID] = mapped_column(ForeignKey("base_models.id"), index=True)
    name: Mapped[str]
    from_checkpoint_id: Mapped[UUID | None] = mapped_column(ForeignKey("checkpoints.id"))
    to_checkpoint_id: Mapped[UUID | None] = mapped_column(ForeignKey("checkpoints.id"))
    moved_by: Mapped[str]
    moved_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())


class Evaluation(Identified, Base):
    """Something drawn or measured of a published checkpoint; its pictures and reports are blobs in the store."""

    __tablename__ = "evaluations"
    __table_args__ = (
        one_of("kind", "preview", "check", "evaluation"),
        one_of("state", "queued", "running", "ready", "failed", "cancelled"),
    )

    checkpoint_id: Mapped[UUID] = mapped_column(ForeignKey("checkpoints.id"), index=True)
    kind: Mapped[str]
    state: Mapped[str] = mapped_column(default="queued")
    request: Mapped[JsonObject]
    report: Mapped[JsonObject | None]
    files: Mapped[list[JsonObject]] = mapped_column(default=list)  # name, sha256, size
    problem: Mapped[JsonObject | None]
    created_by: Mapped[str]

    checkpoint: Mapped[Checkpoint] = relationship()


class SigningKey(Base):
    """The public half of a key that checkpoints were signed with."""

    __tablename__ = "signing_keys"

    id: Mapped[str] = mapped_column(primary_key=True)  # SHA-256 of the PEM: the publicKey.hint in model.sig
    public_key: Mapped[str]  # PEM
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    last_used_at: Mapped[datetime] = mapped_column(server_default=func.now())


class Job(Identified, Base):
    """A piece of work. At most one attempt holds its lease, and only that attempt may write its result."""

    __tablename__ = "jobs"
    __table_args__ = (
        one_of("kind", *KINDS),
        one_of("state", "queued", "running", "succeeded", "failed", "cancelled"),
        Index("ix_jobs_waiting", "id", postgresql_where="state IN ('queued', 'running')"),
        Index("ix_jobs_queue", "fair_order", "id", postgresql_where=f"state = 'queued' AND NOT {IS_DELIVERY}"),
        Index("ix_jobs_deliveries", "fair_order", "id", postgresql_where=f"state = 'queued' AND {IS_DELIVERY}"),
        Index("ix_jobs_queue_of", "created_by", "fair_order", postgresql_where="state = 'queued'"),
        Index("ix_jobs_running", "kind", postgresql_where="state = 'running'"),
    )

    kind: Mapped[str]
    target_id: Mapped[UUID] = mapped_column(index=True)  # the row of the kind's table
    state: Mapped[str] = mapped_column(default="queued")
    created_by: Mapped[str] = mapped_column(server_default="")
    fair_order: Mapped[int] = mapped_column(BigInteger, server_default="0")  # jobs are claimed in this order
    due_at: Mapped[datetime] = mapped_column(server_default=func.now())  # not claimed before
    attempt: Mapped[int] = mapped_column(default=0)  # counts the claims
    payload_version: Mapped[int] = mapped_column(default=1)
    worker: Mapped[str | None]
    lease_expires_at: Mapped[datetime | None]
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    progress: Mapped[JsonObject | None]
    problem: Mapped[JsonObject | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None] = mapped_column(index=True)


class Worker(Base):
    """A worker with a recent heartbeat. A worker that ends deletes its row."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[str]
    started_at: Mapped[datetime] = mapped_column(server_default=func.now())
    seen_at: Mapped[datetime] = mapped_column(server_default=func.now())


class IdempotencyKey(Base):
    """The first answer to a POST, replayed to its repetitions for 24 hours."""

    __tablename__ = "idempotency_keys"

    principal: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    request_sha256: Mapped[bytes]  # of method, path, query and body
    status: Mapped[int | None]  # none while in flight
    headers: Mapped[JsonObject | None]
    body: Mapped[bytes | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now(), index=True)


class Webhook(Identified, Base):
    """A receiver of events. Its secret is derived from the service's webhook key and `secret_salt`, never stored."""

    __tablename__ = "webhooks"

    url: Mapped[str]
    events: Mapped[list[str]]
    description: Mapped[str | None]
    enabled: Mapped[bool] = mapped_column(default=True)
    disabled_reason: Mapped[str | None]
    key_id: Mapped[str]  # which webhook key
    secret_salt: Mapped[bytes]
    previous_secret_salt: Mapped[bytes | None]  # after a rotation both secrets sign, until it expires
    previous_secret_expires_at: Mapped[datetime | None]
    failing_since: Mapped[datetime | None]  # the first failure after the last success
    paused_until: Mapped[datetime | None]  # nothing is sent before: a delivery failed, or the receiver asked for time
    created_by: Mapped[str]


class WebhookDelivery(Identified, Base):
    """An event for one receiver: written with the state change. A job sends it after the commit."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (one_of("state", "pending", "delivered", "failed"), Index(None, "webhook_id", "id"))

    webhook_id: Mapped[UUID] = mapped_column(ForeignKey("webhooks.id", ondelete="CASCADE"))
    message_id: Mapped[str]  # the same however often the event is sent to this receiver
    event: Mapped[str]
    body: Mapped[str]  # as it is signed and sent
    state: Mapped[str] = mapped_column(default="pending")
    attempts: Mapped[list[JsonObject]] = mapped_column(default=list)  # number, at, status, error, seconds, excerpt


class AuditEvent(Base):
    """Who changed what, when and why. Each row carries the hash of the one before; rows are added and never changed."""

    __tablename__ = "audit_events"
    __table_args__ = (Index("ix_audit_events_edits", text("(details -> 'edits')"), postgresql_using="gin"),)

    sequence: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    at: Mapped[datetime] = mapped_column(index=True)
    actor: Mapped[str] = mapped_column(index=True)
    action: Mapped[str] = mapped_column(index=True)
    target: Mapped[str] = mapped_column(index=True)
    details: Mapped[JsonObject]
    before: Mapped[JsonObject | None]  # what of the target changed, as it was
    after: Mapped[JsonObject | None]  # and as it is
    reason: Mapped[str | None]
    request_id: Mapped[str | None] = mapped_column(index=True)  # none: it was no request that did it
    address: Mapped[str | None]  # that the request came from
    previous_hash: Mapped[bytes]
    hash: Mapped[bytes]
