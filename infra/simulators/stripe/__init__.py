"""A Stripe for one machine: Checkout, payments, refunds, disputes; webhooks signed, repeated, reordered, retried."""
