"""Where events are sent to: webhooks and Slack-compatible hooks. Nothing here ever holds up a request."""
