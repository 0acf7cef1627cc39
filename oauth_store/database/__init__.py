"""Three tables, and how they are reached. Nothing here knows a flow, or HTTP."""
