"""One model call: verify → quote → hold → lease → forward → relay → report. The charge is metering's."""

from services.gateway.handlers.admission import authenticate
from services.gateway.handlers.calls import Gateway, Incoming, Running
from services.gateway.handlers.chat import complete_chat, note_refusal
from services.gateway.handlers.models import model, models

__all__ = ["Gateway", "Incoming", "Running", "authenticate", "complete_chat", "model", "models", "note_refusal"]
