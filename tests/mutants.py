"""Deliberate faults in the code, one at a time: the tests have to catch each of them.

`make mutants`, or `python -m tests.mutants --help`. Nothing is changed in the checkout: each fault is made in a copy.
"""

import argparse
import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEST_SECONDS = 120
"""How long one test may take: what hangs for longer counts as caught."""
RUN_SECONDS = 600
"""How long the tests of one fault may take."""
SUITE_SECONDS = 3600
"""How long the whole suite may take, with --all."""
LEAVE_SECONDS = 30
"""How long pytest may take to leave once it was told to: it has servers to stop."""
LINKED = ("tests/clients/node_modules", "tests/clients/agents/node_modules")
"""What is built once in a checkout, too large to copy."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: in `file`, the text `old`, which stands there exactly once, becomes `new`. `tests` catch it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS = (
    # Whose it is
    Fault(
        "A code or a refresh token of another client is accepted",
        "oauth_store/flows/tokens.py",
        "row if row.client_id == client_id else None",
        "row",
        (
            "tests/flows/test_refresh.py::TestDead::test_another_client",
            "tests/flows/test_revocation.py::TestCodeReplay::test_by_another_client",
        ),
    ),
    Fault(
        "A client can revoke another client's token",
        "oauth_store/flows/revocation.py",
        "if row is None or row.client_id != client_id or row",
        "if row is None or row",
        ("tests/server/test_endpoints.py::TestRevoke::test_another_clients_token_stays",),
    ),
    Fault(
        "A confidential client needs no secret at /token",
        "oauth_store/flows/clients.py",
        "if secret is None or not matches(secret, client.secret_hash):",
        "if secret is not None and not matches(secret, client.secret_hash):",
        ("tests/server/test_endpoints.py::TestClientAuthentication::test_a_wrong_or_missing_secret_is_invalid_client",),
    ),
    Fault(
        "A confidential client needs no secret at /revoke",
        "oauth_store/server/revoke.py",
        "clients.authenticate(None if found is None else as_stored(found, self._issuer.scopes), secret)",
        "as_stored(found, self._issuer.scopes)",
        ("tests/server/test_endpoints.py::TestRevoke::test_a_confidential_client_revokes_nothing_without_its_secret",),
    ),
    Fault(
        "A client secret that has expired is accepted",
        "oauth_store/flows/clients.py",
        "if client.client_secret_expires_at and client.client_secret_expires_at < time.time():",
        "if False:",
        ("tests/server/test_endpoints.py::TestClientAuthentication::test_a_secret_is_good_until_it_expires",),
    ),
    Fault(
        "A confidential client whose secret is lost gets in without one",
        "oauth_store/flows/clients.py",
        "    if client.is_public:",
        "    if client.is_public or client.secret_hash is None:",
        ("tests/server/test_endpoints.py::TestClientAuthentication::test_a_secret_that_this_server_has_lost",),
    ),
    Fault(
        "A client may use a grant type that it did not register for",
        "oauth_store/flows/clients.py",
        "if grant_type not in admitted.grant_types:",
        "if not admitted:",
        ("tests/server/test_conformance.py::TestTokenErrors::test_a_grant_that_the_client_did_not_register_for",),
    ),
    # Notifications
    Fault(
        "A failed notification logs the webhook's URL",
        "oauth_store/notifications.py",
        "else type(error).__name__",
        "else repr(error)",
        ("tests/pages/test_notifications.py::TestFunction::test_one_that_fails",),
    ),
    Fault(
        "Any number of notifications wait",
        "oauth_store/notifications.py",
        " or len(self._tasks) >= WAITING:",
        ":",
        ("tests/pages/test_notifications.py::TestAway::test_it_hangs",),
    ),
    # Passkeys
    Fault(
        "A touch for one request allows another one",
        "oauth_store/flows/challenges.py",
        '    tokens.c.paired_hash == bindparam("b_about"),\n',
        '    bindparam("b_about").is_not(None),\n',
        (
            "tests/pages/test_passkeys.py::TestConsent::test_another_request",
            "tests/pages/test_passkeys.py::TestConsent::test_other_scopes",
        ),
    ),
    Fault(
        "A touch allows other scopes than those that were ticked",
        "oauth_store/pages/consent.py",
        "str(waiting.client.client_id), *granted)",
        "str(waiting.client.client_id))",
        ("tests/pages/test_passkeys.py::TestConsent::test_other_scopes",),
    ),
    Fault(
        "A challenge never expires",
        "oauth_store/flows/challenges.py",
        'b_about"),\n    tokens.c.expires_at > bindparam("b_now"),\n',
        'b_about"),\n    bindparam("b_now").is_not(None),\n',
        ("tests/pages/test_passkeys.py::TestConsent::test_five_minutes",),
    ),
    Fault(
        "A challenge or a link is good any number of times",
        "oauth_store/flows/challenges.py",
        "    if not session.execute(statement, values).rowcount:",
        "    if session.execute(statement, values).rowcount < 0:",
        (
            "tests/pages/test_passkeys.py::TestConsent::test_a_challenge_is_used_once",
            "tests/pages/test_passkeys.py::TestEnrollment::test_once",
        ),
    ),
    Fault(
        "A link that adds a passkey never expires",
        "oauth_store/flows/passkeys.py",
        '    tokens.c.kind == ENROLLMENT,\n    tokens.c.expires_at > bindparam("b_now"),\n',
        '    tokens.c.kind == ENROLLMENT,\n    bindparam("b_now").is_not(None),\n',
        ("tests/pages/test_passkeys.py::TestEnrollment::test_too_late",),
    ),
    Fault(
        "Any secret of the database is a link that adds a passkey",
        "oauth_store/flows/passkeys.py",
        "    tokens.c.kind == ENROLLMENT,\n",
        '    tokens.c.kind != "",\n',
        ("tests/pages/test_passkeys.py::TestDatabase::test_no_row_is_a_token",),
    ),
    Fault(
        "Any row of the database is a passkey",
        "oauth_store/flows/passkeys.py",
        '_is_passkey = (tokens.c.token_hash == bindparam("b_hash"), tokens.c.kind == PASSKEY)',
        '_is_passkey = (tokens.c.token_hash == bindparam("b_hash"), tokens.c.kind != "")',
        ("tests/pages/test_passkeys.py::TestDatabase::test_no_row_is_a_token",),
    ),
    Fault(
        "A link adds a passkey at another server",
        "oauth_store/pages/enrollment.py",
        "if link is None or not same_resource(link.url, party.url):",
        "if link is None:",
        ("tests/pages/test_passkeys.py::TestEnrollment::test_another_server",),
    ),
    Fault(
        "A link adds a passkey of a user who does not exist",
        "oauth_store/pages/enrollment.py",
        "if link.user not in way.users:",
        "if False:",
        ("tests/pages/test_passkeys.py::TestEnrollment::test_a_user_who_does_not_exist",),
    ),
    Fault(
        "A passkey of another server signs in here",
        "oauth_store/flows/passkeys.py",
        "_passkey(row) if row is not None and issuer.is_ours(row.resource) else None",
        "_passkey(row) if row is not None else None",
        ("tests/pages/test_passkeys.py::TestEnrollment::test_another_server",),
    ),
    Fault(
        "A passkey signs in without its user's verification",
        "oauth_store/webauthn.py",
        "UserVerificationRequirement.REQUIRED}",
        "UserVerificationRequirement.PREFERRED}",
        (
            "tests/pages/test_passkeys.py::TestConsent::test_what_is_refused",
            "tests/pages/test_passkeys.py::TestEnrollment::test_what_is_refused",
        ),
    ),
    Fault(
        "A page of any origin gets a passkey's signature",
        "oauth_store/webauthn.py",
        "verify_origin=lambda origin: origin == self.origin",
        'verify_origin=lambda origin: origin != ""',
        ("tests/pages/test_passkeys.py::TestConsent::test_what_is_refused",),
    ),
    Fault(
        "A frame of another site gets a passkey's signature",
        "oauth_store/webauthn.py",
        "if client_data.cross_origin:",
        "if False:",
        ("tests/pages/test_passkeys.py::TestConsent::test_what_is_refused",),
    ),
    Fault(
        "A passkey need not name its user",
        "oauth_store/webauthn.py",
        'if encoded(answer.user_handle or b"") != handle:',
        "if False:",
        ("tests/pages/test_passkeys.py::TestConsent::test_what_is_refused",),
    ),
    Fault(
        "A copy of a passkey signs in",
        "oauth_store/flows/passkeys.py",
        'tokens.c.granted_at <= bindparam("b_before")',
        'bindparam("b_before").is_not(None)',
        ("tests/pages/test_passkeys.py::TestConsent::test_a_count_that_goes_back",),
    ),
    Fault(
        "The passkey of a user who left signs in",
        "oauth_store/pages/passkeys.py",
        "passkey is None or passkey.user not in self.users:",
        "passkey is None:",
        ("tests/pages/test_passkeys.py::TestConsent::test_a_user_who_left",),
    ),
    Fault(
        "A session outlives the passkey that began it",
        "oauth_store/flows/sessions.py",
        "tokens.c.paired_hash.is_(None) | _key.c.token_hash.is_not(None),",
        "tokens.c.paired_hash.is_(None) | tokens.c.paired_hash.is_not(None),",
        ("tests/pages/test_passkeys.py::TestApps::test_the_session_ends_with_the_passkey",),
    ),
    Fault(
        "Revoke all and New token ask for nothing",
        "oauth_store/pages/apps.py",
        "                await self._confirm(request, form, signed_in, purpose)\n",
        "                pass\n",
        ("tests/pages/test_passkeys.py::TestApps::test_what_is_confirmed",),
    ),
    Fault(
        "A touch for one token makes another one",
        "oauth_store/pages/apps.py",
        'CONFIRMED = ("revoke", "create", "name", "expires", "resource")',
        'CONFIRMED = ("revoke", "create")',
        ("tests/pages/test_passkeys.py::TestApps::test_a_touch_confirms_one_thing",),
    ),
    Fault(
        "A passkey of another user confirms",
        "oauth_store/pages/apps.py",
        "if again.user != user:",
        "if False:",
        ("tests/pages/test_passkeys.py::TestApps::test_another_user_does_not_confirm",),
    ),
    Fault(
        "A touch signs in another browser",
        "oauth_store/pages/apps.py",
        'about("sign in", self._url, browser)',
        'about("sign in", self._url)',
        ("tests/pages/test_passkeys.py::TestApps::test_signing_in_elsewhere",),
    ),
    Fault(
        "A form of an old list signs in",
        "oauth_store/pages/apps.py",
        ' or "csrf" in form or',
        " or",
        ("tests/pages/test_passkeys.py::TestApps::test_a_form_after_the_session",),
    ),
    Fault(
        "Anyone can guess at links without end",
        "oauth_store/pages/enrollment.py",
        'wait = self._limiter.retry_after((WRONG_IN_TOTAL, "wrong"), (PER_ADDRESS, address))',
        "wait = None",
        ("tests/pages/test_passkeys.py::TestEnrollment::test_guesses_are_limited",),
    ),
    Fault(
        "Anyone can ask for challenges without end",
        "oauth_store/pages/sign_in.py",
        'else (QUESTIONS, f"question {known or address}")',
        'else (None, "")',
        ("tests/pages/test_passkeys.py::TestConsent::test_challenges_are_limited",),
    ),
    # Accounts at an identity provider
    Fault(
        "An address that the provider has not verified gets in",
        "oauth_store/openid.py",
        'claims.get("email_verified") is True',
        'claims.get("email_verified") is not False',
        ("tests/pages/test_accounts.py::TestWho::test_not_allowed",),
    ),
    Fault(
        "UserInfo of another person is taken",
        "oauth_store/openid.py",
        'if more.get("sub") != claims["sub"]:',
        "if False:",
        ("tests/pages/test_accounts.py::TestWho::test_from_userinfo",),
    ),
    Fault(
        "An ID token of another sign-in is taken",
        "oauth_store/openid.py",
        '{"nonce": attempt.nonce, "client_id"',
        '{"client_id"',
        (
            "tests/pages/test_accounts.py::TestTokens::test_claims",
            "tests/pages/test_accounts.py::TestResponses::test_tampered",
        ),
    ),
    Fault(
        "An ID token for another client is taken",
        "oauth_store/openid.py",
        '"aud": {"essential": True, "value": self._client_id},',
        "",
        ("tests/pages/test_accounts.py::TestTokens::test_claims",),
    ),
    Fault(
        "The code of a mix-up goes to the wrong provider",
        "oauth_store/openid.py",
        'if response.get("iss", self._issuer) != self._issuer or (',
        "if (",
        ("tests/pages/test_accounts.py::TestResponses::test_wrong",),
    ),
    Fault(
        "Metadata of another issuer are taken",
        "oauth_store/openid.py",
        'if found.get("issuer") != self._issuer:',
        "if False:",
        ("tests/pages/test_accounts.py::TestOutage::test_metadata",),
    ),
    Fault(
        "A sign-in at the provider is good any number of times",
        "oauth_store/pages/callback.py",
        "await challenges.use(self._approver.issuer, state, self._purpose(secret, handle))",
        "await challenges.ask(self._approver.issuer, state, 1)",
        (
            "tests/pages/test_accounts.py::TestResponses::test_another_browser",
            "tests/pages/test_accounts.py::TestResponses::test_too_late",
        ),
    ),
    Fault(
        "A sign-in is for any request",
        "oauth_store/pages/callback.py",
        "return about(ACCOUNT, self._url, secret, handle)",
        "return about(ACCOUNT, self._url, secret)",
        ("tests/pages/test_accounts.py::TestResponses::test_a_cookie_that_names_another_request",),
    ),
    Fault(
        "A user who signed in for one request answers another one",
        "oauth_store/pages/sessions.py",
        'return derive(value, f"request {handle}")',
        'return derive(value, "request")',
        ("tests/pages/test_accounts.py::TestResponses::test_another_request",),
    ),
    Fault(
        "A browser that stays signed in outlives the entry that let its user in",
        "oauth_store/pages/accounts.py",
        "about(entry, user, value))) for entry in self._allow)",
        "about(entry, user, value))) for entry in (*self._allow, user))",
        ("tests/pages/test_accounts.py::TestStay::test_it_ends_with_what_began_it",),
    ),
    Fault(
        "A browser that stays signed in opens the page of connected apps",
        "oauth_store/flows/sessions.py",
        'tokens.c.kind == bindparam("b_kind"))',
        'bindparam("b_kind").is_not(None))',
        ("tests/pages/test_accounts.py::TestApps::test_a_sign_in_for_a_request_is_none_here",),
    ),
    Fault(
        "Users of accounts see the apps of all",
        "oauth_store/pages/sign_in.py",
        "return None if user == OWNER and not self.asks_user else user",
        "return None if not self.asks_user else user",
        ("tests/pages/test_accounts.py::TestApps::test_each_user_sees_their_own",),
    ),
    Fault(
        "A sign-in at the provider confirms for good",
        "oauth_store/pages/apps.py",
        "time.time() - signed_in.at < FRESH_SECONDS",
        "time.time() > signed_in.at - FRESH_SECONDS",
        ("tests/pages/test_accounts.py::TestApps::test_confirming",),
    ),
    # Devices
    Fault(
        "A device whose request was revoked looks like a replay",
        "oauth_store/flows/devices.py",
        "    if row.state is None:\n",
        "    if False:\n",
        ("tests/flows/test_devices.py::TestFlow::test_revoked_before_the_device_came_back",),
    ),
    Fault(
        "A device's assertion is good for many device codes",
        "oauth_store/flows/devices.py",
        "    session.execute(insert(codes), row)\n    spend(session, secret, now)\n",
        "    session.execute(insert(codes), row)\n",
        ("tests/flows/test_devices.py::TestFlow::test_a_device_with_keys",),
    ),
    Fault(
        "A device's assertion is good for many pairs",
        "oauth_store/flows/devices.py",
        "    spend(session, device.secret, now)\n",
        "",
        ("tests/flows/test_devices.py::TestFlow::test_a_device_with_keys",),
    ),
    Fault(
        "A device code passes for an authorization code",
        "oauth_store/flows/code.py",
        "    codes.c.redirect_uri != DEVICE,\n",
        "",
        ("tests/flows/test_devices.py::TestWrongPlaces::test_a_device_code_elsewhere",),
    ),
    Fault(
        "A device code never expires",
        "oauth_store/flows/devices.py",
        "if row.expires_at <= now:",
        "if False:",
        ("tests/flows/test_devices.py::TestFlow::test_too_late",),
    ),
    Fault(
        "A device code gets a pair for each of several requests at once",
        "oauth_store/flows/devices.py",
        "    .where(*_is_device_code, codes.c.approved_at.is_not(None), codes.c.consumed_at.is_(None))",
        "    .where(*_is_device_code)",
        ("tests/flows/test_devices.py::TestFlow::test_once",),
    ),
    Fault(
        "A replayed device code leaves its grant alive",
        "oauth_store/flows/devices.py",
        '        revoke_grants(session, [row.grant_id], "code replayed", now)\n',
        "",
        ("tests/flows/test_devices.py::TestFlow::test_a_replay",),
    ),
    Fault(
        "A device gets its tokens at another server",
        "oauth_store/flows/devices.py",
        "if row is None or not issuer.is_ours(row.resource):\n        raise TokenError",
        "if row is None:\n        raise TokenError",
        ("tests/flows/test_devices.py::TestWrongPlaces::test_another_server",),
    ),
    Fault(
        "A user code opens the request of another server's device",
        "oauth_store/flows/devices.py",
        "if row is None or not issuer.is_ours(row.resource):\n        return None",
        "if row is None:\n        return None",
        ("tests/flows/test_devices.py::TestWrongPlaces::test_another_server",),
    ),
    Fault(
        "Any client gets a device code without its secret or the grant",
        "oauth_store/flows/devices.py",
        "    admit(get_client(session, issuer.scopes, client_id), secret, DEVICE_CODE)\n",
        "",
        (
            "tests/flows/test_devices.py::TestWrongPlaces::test_a_client_without_the_grant",
            "tests/flows/test_devices.py::TestFlow::test_a_confidential_device",
        ),
    ),
    Fault(
        "A code that was denied after all looks like a replay",
        "oauth_store/flows/authorization.py",
        "values(approved_at=null(), consumed_at",
        "values(consumed_at",
        ("tests/pages/test_consent.py::TestAnswer::test_deny_after_allow",),
    ),
    Fault(
        "User codes may be guessed without end",
        "oauth_store/pages/device.py",
        "        if seconds is not None:",
        "        if False:",
        ("tests/flows/test_devices.py::TestGuesses::test_a_hundred_guesses",),
    ),
    Fault(
        "Another site may type a user code",
        "oauth_store/pages/device.py",
        "if not from_our_page(request, self._url):",
        "if False:",
        ("tests/flows/test_devices.py::TestTwoBrowsers::test_a_form_of_another_site",),
    ),
    # Clients with keys
    Fault(
        "A client with keys needs no assertion",
        "oauth_store/flows/clients.py",
        "if isinstance(secret, VerifiedAssertion) and secret.client_id == client.client_id:",
        "if True:",
        ("tests/server/test_private_key_jwt.py::TestRefused::test_without_a_fetch",),
    ),
    Fault(
        "An assertion authenticates another client",
        "oauth_store/flows/assertions.py",
        'if claims.get("iss") != client_id or claims.get("sub") != client_id:',
        "if False:",
        ("tests/server/test_private_key_jwt.py::TestRefused",),
    ),
    Fault(
        "An assertion for another server authenticates",
        "oauth_store/flows/assertions.py",
        "    if not any(audience in audiences for audience in (named if isinstance(named, list) else [named])):",
        "    if False:",
        ("tests/server/test_private_key_jwt.py::TestRefused::test_without_a_fetch",),
    ),
    Fault(
        "An assertion without an end authenticates",
        "oauth_store/flows/assertions.py",
        " and 0 <= value < _LATEST",
        "",
        ("tests/server/test_private_key_jwt.py::TestRefused::test_without_a_fetch",),
    ),
    Fault(
        "An assertion of any length is read",
        "oauth_store/flows/assertions.py",
        "if len(text) <= ASSERTION_BYTES and ",
        "if ",
        ("tests/server/test_private_key_jwt.py::TestRefused::test_without_a_fetch",),
    ),
    Fault(
        "An assertion that is nested deeply is a crash",
        "oauth_store/flows/assertions.py",
        "        except (ValueError, RecursionError):\n            header",
        "        except ValueError:\n            header",
        ("tests/server/test_private_key_jwt.py::TestRefused::test_without_a_fetch",),
    ),
    Fault(
        "The signature of an assertion is not checked",
        "oauth_store/flows/client_keys.py",
        "                return True\n    return False\n",
        "                return True\n    return True\n",
        ("tests/server/test_private_key_jwt.py::TestRefused::test_by_its_keys",),
    ),
    Fault(
        "A client with a secret may sign as well",
        "oauth_store/server/client_assertion.py",
        '            raise AuthenticationError("the request uses two authentication methods at once")\n',
        "            pass\n",
        ("tests/server/test_private_key_jwt.py::TestRefused::test_without_a_fetch",),
    ),
    Fault(
        "An assertion is good for many codes",
        "oauth_store/flows/code.py",
        "    spend(session, code.secret, now)\n",
        "",
        ("tests/server/test_private_key_jwt.py::TestFlow::test_it_gets_in_and_stays_in",),
    ),
    Fault(
        "An assertion is good for many refreshes",
        "oauth_store/flows/refresh.py",
        "    spend(session, token.secret, now)\n",
        "",
        ("tests/server/test_private_key_jwt.py::TestOnce",),
    ),
    Fault(
        "An assertion that was used revokes",
        "oauth_store/flows/revocation.py",
        "        spend(session, secret, now)\n",
        "        pass\n",
        ("tests/server/test_private_key_jwt.py::TestOnce::test_a_second_time",),
    ),
    Fault(
        "A revocation that ends nothing leaves a row",
        "oauth_store/flows/revocation.py",
        "    if _end_grant(session, issuer, client_id, token, now):",
        "    if _end_grant(session, issuer, client_id, token, now) or True:",
        ("tests/flows/test_assertions.py::TestRows::test_revocations_of_nothing",),
    ),
    Fault(
        "Used assertions count as grants of their client",
        "oauth_store/flows/registered.py",
        " & Token.kind.in_((ACCESS, REFRESH))",
        "",
        ("tests/flows/test_assertions.py::TestRows::test_they_are_no_grants",),
    ),
    Fault(
        "A used assertion does not go with its client",
        "oauth_store/flows/assertions.py",
        '        "client_id": client_id,\n        "scopes"',
        '        "client_id": None,\n        "scopes"',
        ("tests/server/test_private_key_jwt.py::TestOnce::test_its_row_is_no_token",),
    ),
    Fault(
        "A used assertion is forgotten while it is valid",
        "oauth_store/flows/assertions.py",
        '"expires_at": expires_at + CLOCK_SKEW_SECONDS,',
        '"expires_at": now,',
        ("tests/server/test_private_key_jwt.py::TestFlow::test_it_gets_in_and_stays_in",),
    ),
    Fault(
        "Two clients cannot use the same jti",
        "oauth_store/flows/assertions.py",
        "json.dumps([JWT_BEARER, assertion.client_id, assertion.jti])",
        "json.dumps([JWT_BEARER, assertion.jti])",
        ("tests/server/test_private_key_jwt.py::TestOnce::test_two_clients_may_choose_the_same_jti",),
    ),
    Fault(
        "The text behind a used assertion is revoked as a token",
        "oauth_store/flows/revocation.py",
        ", tokens.c.kind.in_((ACCESS, REFRESH))",
        "",
        ("tests/server/test_private_key_jwt.py::TestOnce::test_its_row_is_no_token",),
    ),
    Fault(
        "The text behind a used assertion is explained as a token",
        "oauth_store/flows/explain.py",
        "tokens.c.token_hash == hashed, _is_presented",
        "tokens.c.token_hash == hashed",
        ("tests/server/test_private_key_jwt.py::TestOnce::test_its_row_is_no_token",),
    ),
    Fault(
        "A stranger with a wrong key makes the server fetch a document each time",
        "oauth_store/server/client_assertion.py",
        "if 0 <= time.time() - self._renewals.get(client_id, 0) < oldest_seconds:",
        "if False:",
        ("tests/server/test_private_key_jwt.py::TestKeys",),
    ),
    Fault(
        "A client whose keys cannot be fetched loses its registration",
        "oauth_store/server/token.py",
        "            return keys_unavailable(error)\n",
        '            return error_answer(401, "invalid_client", str(error))\n',
        ("tests/server/test_private_key_jwt.py::TestKeys::test_keys_that_cannot_be_had",),
    ),
    Fault(
        "A private key that a client publishes is stored",
        "oauth_store/flows/client_keys.py",
        'for name in ("kty", "kid", "alg", *_MEMBERS[key["kty"]])',
        "for name in key",
        ("tests/server/test_private_key_jwt.py::TestFlow::test_a_private_key_is_never_stored",),
    ),
    Fault(
        "A key that its client has replaced counts for good",
        "oauth_store/server/client_assertion.py",
        "if 0 <= time.time() - read_at < DAILY_SECONDS:",
        "if True:",
        ("tests/server/test_private_key_jwt.py::TestRemovedKeys::test_after_a_day_at_most",),
    ),
    Fault(
        "Keys that their host has withdrawn count",
        "oauth_store/flows/metadata_documents.py",
        "self._kept.pop(url, None)  # what its host has withdrawn must not come back",
        "pass",
        ("tests/server/test_private_key_jwt.py::TestRemovedKeys::test_a_set_without_keys",),
    ),
    Fault(
        "A key counts after the client's document has removed all",
        "oauth_store/flows/documented_clients.py",
        "if isinstance(error, NoKeysError) and has_keys:",
        "if False:",
        ("tests/server/test_private_key_jwt.py::TestRemovedKeys::test_a_document_without_keys",),
    ),
    Fault(
        "An authorization request replaces a client of the owner",
        "oauth_store/flows/documented_clients.py",
        "    if await added_by_owner(issuer, stored):\n",
        "    if False:\n",
        ("tests/server/test_private_key_jwt.py::TestStrangers::test_replace_a_client_of_the_owner",),
    ),
    Fault(
        "An assertion replaces a client of the owner",
        "oauth_store/server/client_assertion.py",
        "return not await documented_clients.added_by_owner(self._server.issuer, client)",
        "return True",
        ("tests/server/test_private_key_jwt.py::TestStrangers::test_replace_a_client_of_the_owner",),
    ),
    Fault(
        "A document that could not be had counts as read",
        "oauth_store/server/client_assertion.py",
        "with suppress(InvalidDocumentError):",
        "with suppress(InvalidDocumentError, DocumentUnavailableError):",
        ("tests/server/test_private_key_jwt.py::TestStrangers::test_hide_an_outage",),
    ),
    Fault(
        "A weak RSA key counts",
        "oauth_store/flows/client_keys.py",
        'return kind != "RSA" or _LEAST_BITS <= _bits(key["n"]) <= _MOST_BITS',
        "return True",
        ("tests/server/test_private_key_jwt.py::TestSets::test_the_size_of_an_rsa_key",),
    ),
    Fault(
        "A key for another purpose counts",
        "oauth_store/flows/client_keys.py",
        'if purposes is not None and not (isinstance(purposes, list) and "verify" in purposes):',
        "if False:",
        ("tests/server/test_private_key_jwt.py::TestSets::test_what_is_passed_over",),
    ),
    Fault(
        "All keys of a set are tried",
        "oauth_store/flows/client_keys.py",
        "(keys, assertion)[:TRIED_KEYS]",
        "(keys, assertion)",
        ("tests/server/test_private_key_jwt.py::TestSets::test_keys_of_one_name",),
    ),
    Fault(
        "All keys of a set are kept",
        "oauth_store/flows/client_keys.py",
        "[:KEYS]",
        "",
        ("tests/server/test_private_key_jwt.py::TestSets::test_what_is_kept_is_small",),
    ),
    Fault(
        "Keys may be at a private address",
        "oauth_store/flows/client_keys.py",
        "    if not is_public:\n",
        "    if False:\n",
        ("tests/server/test_private_key_jwt.py::TestAddresses",),
    ),
    Fault(
        "An issuer that nobody trusts gets a thread",
        "oauth_store/flows/identity.py",
        "if not isinstance(name, str) or name not in self.config.trusted_issuers:",
        "if not isinstance(name, str):",
        ("tests/flows/test_identity_providers.py::test_a_stranger_gets_no_thread",),
    ),
    Fault(
        "Identity providers share a thread",
        "oauth_store/flows/identity.py",
        "key = os.getpid(), name",
        'key = os.getpid(), ""',
        ("tests/flows/test_identity_providers.py::test_one_that_hangs_holds_up_no_other",),
    ),
    Fault(
        "An identity provider that never ends its answer keeps its thread",
        "oauth_store/flows/identity.py",
        "asyncio.run(asyncio.wait_for(validation, VALIDATION_SECONDS))",
        "asyncio.run(validation)",
        ("tests/flows/test_identity_providers.py::test_an_answer_has_to_end",),
    ),
    Fault(
        "Users wait for each other's answers of an identity provider",
        "oauth_store/flows/identity.py",
        "await asyncio.wait_for(validated, VALIDATION_SECONDS)",
        "await validated",
        ("tests/flows/test_identity_providers.py::test_an_answer_has_to_end",),
    ),
    Fault(
        "Any number of users waits for an identity provider",
        "oauth_store/flows/identity.py",
        "if self._waiting >= WAITING_IDENTITIES:",
        "if False:",
        ("tests/flows/test_identity_providers.py::test_only_some_may_wait",),
    ),
    # Users of identity providers
    Fault(
        "An identity provider's assertion is good twice",
        "oauth_store/flows/identity.py",
        "    use_once(session, asserted.name, asserted.client_id, asserted.assertion_expires_at, now)\n",
        "",
        ("tests/flows/test_identity.py::TestOnce",),
    ),
    Fault(
        "Two identity providers cannot use the same jti",
        "oauth_store/flows/identity.py",
        'json.dumps([JWT_BEARER_GRANT_TYPE, claims["iss"], claims["jti"]])',
        'json.dumps([JWT_BEARER_GRANT_TYPE, claims["jti"]])',
        ("tests/flows/test_identity.py::TestOnce::test_two_issuers_may_choose_the_same_jti",),
    ),
    Fault(
        "A user's assertion for another resource is accepted",
        "oauth_store/flows/identity.py",
        "str(client.client_id), resource)",
        "str(client.client_id), None)",
        ("tests/flows/test_identity.py::TestRefused::test_an_assertion",),
    ),
    Fault(
        "A user's assertion of any length is read",
        "oauth_store/flows/identity.py",
        "if len(assertion) > IDENTITY_BYTES:",
        "if False:",
        ("tests/flows/test_identity.py::TestRefused::test_an_assertion",),
    ),
    Fault(
        "A user's assertion that is nested deeply, or whose end is infinite, is a crash",
        "oauth_store/flows/identity.py",
        "        except Exception as error:  # of FastMCP",
        "        except KeyError as error:  # of FastMCP",
        ("tests/flows/test_identity.py::TestRefused::test_an_assertion",),
    ),
    Fault(
        "A user has any name",
        "oauth_store/flows/identity.py",
        "if not isinstance(subject, str) or not subject.isprintable() or len(subject) > SUBJECT_LENGTH:",
        "if False:",
        ("tests/flows/test_identity.py::TestRefused::test_an_assertion",),
    ),
    Fault(
        "A public client presents a user's assertion",
        "oauth_store/server/identity.py",
        " or client.is_public:",
        ":",
        ("tests/flows/test_identity.py::TestRefused::test_a_client",),
    ),
    Fault(
        "A client presents a user's assertion that the owner did not add for that",
        "oauth_store/server/identity.py",
        "    if JWT_BEARER_GRANT_TYPE not in client.grant_types or ",
        "    if ",
        ("tests/flows/test_identity.py::TestRefused::test_a_client",),
    ),
    Fault(
        "A client that presents a user's assertion is not authenticated",
        "oauth_store/server/identity.py",
        "clients.authenticate(None if found is None else as_stored(found, server.issuer.scopes), secret)",
        "as_stored(found, server.issuer.scopes)",
        ("tests/flows/test_identity.py::TestRefused::test_a_request",),
    ),
    Fault(
        "A client's own assertion is good for many users",
        "oauth_store/flows/identity.py",
        "        spend(session, params.secret, now)\n",
        "        pass\n",
        ("tests/flows/test_identity.py::TestKeyClients",),
    ),
    Fault(
        "A client's own assertion is good for many users of an application's own method",
        "oauth_store/server/identity.py",
        "        await identity.use_up(server.issuer, secret)\n",
        "        pass\n",
        ("tests/flows/test_identity.py::TestKeyClients",),
    ),
    Fault(
        "A request gets a scope that is not asserted",
        "oauth_store/flows/identity.py",
        "[scope for scope in granted if scope in wanted] if wanted else granted",
        "list(wanted) or granted",
        ("tests/flows/test_identity.py::TestScopes",),
    ),
    Fault(
        "An assertion gives a scope that the client may not have",
        "oauth_store/flows/identity.py",
        "[scope for scope in asserted if scope in offered]",
        "list(asserted)",
        ("tests/flows/test_identity.py::TestScopes",),
    ),
    Fault(
        "An assertion without a required scope gives a token",
        "oauth_store/flows/identity.py",
        "    if not required <= set(granted):",
        "    if False:",
        ("tests/flows/test_identity.py::TestScopes::test_a_required_one",),
    ),
    Fault(
        "A user's token is purged with its client",
        "oauth_store/flows/identity.py",
        '    session.execute(_keep_client, {"b_client_id": asserted.client_id, "b_now": now})\n',
        "",
        ("tests/flows/test_identity.py::TestFlow::test_a_client_that_is_only_registered_is_kept",),
    ),
    Fault(
        "A user's assertion that this process has seen is used up though its request failed",
        "oauth_store/flows/identity.py",
        '        getattr(self._validator, "_jti_cache", {}).clear()\n',
        "",
        ("tests/flows/test_identity.py::TestRefused::test_a_request",),
    ),
    Fault(
        "A client without a secret is registered for users' assertions",
        "oauth_store/flows/registration.py",
        "        if not client.jwks_uri and not _keys(client):",
        "        if False:",
        ("tests/flows/test_identity.py::TestOwner::test_what_is_no_such_client",),
    ),
    # Machines
    Fault(
        "A client that the owner did not add as a machine gets tokens for its secret",
        "oauth_store/flows/machine.py",
        "if not client.is_machine or client.secret_hash is None:",
        "if client.secret_hash is None:",
        ("tests/flows/test_machine.py::TestToken::test_any_other_client",),
    ),
    Fault(
        "A machine needs no secret",
        "oauth_store/flows/machine.py",
        "client = authenticate(get_client(session, issuer.scopes, machine.client_id), machine.secret)",
        "client = get_client(session, issuer.scopes, machine.client_id) or authenticate(None, None)",
        ("tests/flows/test_machine.py::TestToken::test_a_wrong_secret",),
    ),
    Fault(
        "A registration keeps client_credentials",
        "oauth_store/server/register.py",
        "if grant not in dropped]",
        "]",
        ("tests/flows/test_machine.py::TestToken::test_registration_never_makes_a_machine",),
    ),
    Fault(
        "A machine can authorize",
        "oauth_store/server/authorize.py",
        '"authorization_code" not in attempt.client.grant_types',
        "False",
        ("tests/flows/test_machine.py::TestToken::test_it_cannot_authorize",),
    ),
    Fault(
        "A machine gets a token for any resource",
        "oauth_store/flows/machine.py",
        "resource = target_of(issuer, machine.resource)",
        "resource = machine.resource or issuer.resource",
        ("tests/flows/test_machine.py::TestToken::test_another_resource",),
    ),
    Fault(
        "A machine's next token has what the owner removed",
        "oauth_store/flows/machine.py",
        "having = [scope for scope in granted if scope in offered]",
        "having = list(offered)",
        ("tests/flows/test_machine.py::TestScopes::test_the_owner_s_narrowing_holds",),
    ),
    Fault(
        "A machine keeps scopes that its owner no longer names",
        "oauth_store/flows/machine.py",
        "having = [scope for scope in granted if scope in offered]",
        "having = list(granted)",
        ("tests/flows/test_machine.py::TestScopes::test_never_more_than_the_owner_named",),
    ),
    Fault(
        "A machine's token misses a change of scopes at the same moment",
        "oauth_store/flows/machine.py",
        'tokens.c.scopes == bindparam("b_granted")',
        '(tokens.c.scopes == bindparam("b_granted")) | (tokens.c.scopes != bindparam("b_granted"))',
        ("tests/flows/test_machine.py::TestAtTheSameMoment::test_a_change_that_is_under_way",),
    ),
    Fault(
        "First tokens of a machine at the same moment begin a grant each",
        "oauth_store/flows/machine.py",
        "update_one(session, _lock_client, b_client_id=client.client_id)",
        "pass",
        ("tests/flows/test_machine.py::TestAtTheSameMoment::test_eight_first_tokens",),
    ),
    Fault(
        "A machine continues its grant at another server",
        "oauth_store/flows/machine.py",
        " if _is_for(issuer, row.resource, resource)",
        " if row",
        ("tests/flows/test_machine.py::TestGrant::test_two_servers_on_one_database",),
    ),
    Fault(
        "A machine that is registered by code is purged",
        "oauth_store/flows/registration.py",
        '"last_used_at": NEVER if client.grant_types in OF_OWNERS else None',
        '"last_used_at": None',
        ("tests/flows/test_machine.py::TestGrant::test_a_machine_is_never_purged",),
    ),
    # What is checked of a code
    Fault(
        "PKCE is not verified",
        "oauth_store/flows/code.py",
        "if not hmac.compare_digest(challenge, row.code_challenge.encode()):",
        "if not challenge:",
        ("tests/server/test_endpoints.py::TestToken::test_pkce_is_verified",),
    ),
    Fault(
        "The redirect URI of a code is not compared",
        "oauth_store/flows/code.py",
        "if row.redirect_uri_provided_explicitly and not _is_uri(code.redirect_uri, row.redirect_uri):",
        "if False:",
        ("tests/server/test_conformance.py::TestTokenErrors::test_each_mistake_has_its_code",),
    ),
    Fault(
        "A code for another server's resource is exchanged",
        "oauth_store/flows/code.py",
        "if not issuer.is_ours(row.resource):",
        "if False:",
        ("tests/flows/test_provider.py::TestAudience::test_a_code_for_another_path_is_refused",),
    ),
    Fault(
        "A refresh may name another resource",
        "oauth_store/flows/refresh.py",
        "        check_resource(issuer, token.resource, row.resource)\n",
        "        pass\n",
        ("tests/server/test_conformance.py::TestTokenErrors::test_a_refresh_for_another_resource",),
    ),
    Fault(
        "An old code without its verifier ends the owner's grant",
        "oauth_store/flows/code.py",
        "        _check(issuer, code, row)\n",
        "        if row.consumed_at is None:\n            _check(issuer, code, row)\n",
        ("tests/server/test_endpoints.py::TestToken::test_a_replay_without_pkce_ends_nothing",),
    ),
    Fault(
        "A code that is replayed does not end its grant",
        "oauth_store/flows/code.py",
        '        revoke_grants(session, [row.grant_id], "code replayed", now)\n',
        "",
        ("tests/flows/test_revocation.py::TestCodeReplay::test_in_turn",),
    ),
    Fault(
        "A code is exchanged twice when both requests come at once",
        "oauth_store/flows/code.py",
        "update(codes).where(*_is_known, codes.c.consumed_at.is_(None))",
        "update(codes).where(*_is_known)",
        ("tests/flows/test_revocation.py::TestCodeReplay::test_who_was_overtaken_gets_nothing",),
    ),
    Fault(
        "A code is good for a second too long",
        "oauth_store/flows/code.py",
        '    codes.c.expires_at > bindparam("b_now"),',
        '    codes.c.expires_at >= bindparam("b_now"),',
        ("tests/flows/test_revocation.py::TestCodeReplay::test_an_expired_code_is_not_redeemed",),
    ),
    Fault(
        "A request may be approved for a second too long",
        "oauth_store/flows/authorization.py",
        'codes.c.expires_at > bindparam("b_now")',
        'codes.c.expires_at >= bindparam("b_now")',
        ("tests/flows/test_provider.py::TestApprove::test_a_request_waits_to_its_last_second",),
    ),
    Fault(
        "A request whose code was used, or that was denied, may be approved again",
        "oauth_store/flows/authorization.py",
        "    codes.c.consumed_at.is_(None),\n",
        "",
        ("tests/flows/test_provider.py::TestApprove::test_deny_tells_the_client",),
    ),
    # What is checked of a token
    Fault(
        "A token for another resource is accepted",
        "oauth_store/flows/access.py",
        'issuer.is_own(fields["resource"]) if resource is None',
        "True if resource is None",
        (
            "tests/flows/test_provider.py::TestAudience::test_a_token_for_another_path_is_refused",
            "tests/flows/test_resources.py::TestVerify::test_all_nine_pairs",
        ),
    ),
    Fault(
        "A host that is silent uses up the time of the others",
        "oauth_store/database/engines.py",
        'options["timeout"] / len(hosts)',
        'options["timeout"]',
        ("tests/system/test_failover.py::test_a_machine_that_is_silent",),
    ),
    Fault(
        "A node of a cluster shows what another one has revoked",
        "oauth_store/database/engines.py",
        "SYNC_READS = 1",
        "SYNC_READS = 0",
        ("tests/system/test_galera.py::test_a_node_that_is_behind",),
    ),
    # Several servers with one login
    Fault(
        "The authorization server takes the tokens of its resources",
        "oauth_store/flows/issuer.py",
        "return resource is None or self.resource is None or same_resource(resource, self.resource)",
        "return self.is_ours(resource) if self.resources else resource is None or self.resource is None or "
        "same_resource(resource, self.resource)",
        ("tests/flows/test_resources.py::TestVerify::test_all_nine_pairs",),
    ),
    Fault(
        "Another server takes tokens without a resource",
        "oauth_store/flows/access.py",
        "return granted is not None and same_resource(granted, resource)",
        "return granted is None or same_resource(granted, resource)",
        ("tests/flows/test_resources.py::TestVerify::test_a_token_of_no_resource",),
    ),
    Fault(
        "Any client may ask about tokens",
        "oauth_store/server/introspect.py",
        "if resource is None or not self._issuer.is_ours(resource):",
        "resource = resource or self._issuer.resource\n        if False:",
        ("tests/server/test_introspection.py::TestWho::test_others",),
    ),
    Fault(
        "A server learns of the tokens of another one",
        "oauth_store/server/introspect.py",
        "await access.verify(self._issuer, token, resource)",
        "await access.load(self._issuer, token)",
        ("tests/server/test_introspection.py::TestAnswer::test_of_another_resource",),
    ),
    Fault(
        "A resource that nobody named gets tokens",
        "oauth_store/flows/issuer.py",
        "        if named is None:\n",
        "        if False:\n",
        ("tests/flows/test_resources.py::TestTarget::test_unknown",),
    ),
    Fault(
        "A form makes a token for any resource",
        "oauth_store/pages/apps.py",
        'resource = self._issuer.target(form.get("resource"))',
        'resource = form.get("resource") or self._issuer.resource',
        ("tests/pages/test_resources.py::TestApps::test_a_token_for_one_server",),
    ),
    Fault(
        "A refresh token for another resource is accepted",
        "oauth_store/flows/refresh.py",
        "if not issuer.is_ours(row.resource):",
        "if False:",
        ("tests/flows/test_refresh.py::TestDead::test_another_resource",),
    ),
    Fault(
        "A token of another server is revoked",
        "oauth_store/flows/revocation.py",
        " or not issuer.is_ours(row.resource):",
        ":",
        ("tests/flows/test_two_servers.py::test_a_token_is_revoked_where_it_is_good",),
    ),
    Fault(
        "A request at another server can be answered",
        "oauth_store/flows/authorization.py",
        "if row is None or not issuer.is_ours(row.resource) or (",
        "if row is None or (",
        ("tests/flows/test_two_servers.py::test_a_request_is_answered_where_it_was_made",),
    ),
    Fault(
        "The list shows the grants of other servers",
        "oauth_store/flows/connected.py",
        "matches &= model.resource.is_(None) | model.resource.in_(spelled)",
        "pass",
        ("tests/flows/test_two_servers.py::test_the_list_is_of_one_server",),
    ),
    Fault(
        "A session of another server is good here",
        "oauth_store/flows/sessions.py",
        "if row is not None and issuer.is_ours(row.resource) else None",
        "if row is not None else None",
        ("tests/flows/test_two_servers.py::test_a_session_is_of_one_server",),
    ),
    Fault(
        "A rotated token does not end its grant",
        "oauth_store/flows/revocation.py",
        "or row.revoked_at is not None or",
        "or row.revoked_at is not None or row.consumed_at is not None or",
        ("tests/server/test_requests.py::TestToken::test_a_token_in_any_state_ends_its_grant",),
    ),
    Fault(
        "The scopes that the owner set by hand are no limit",
        "oauth_store/flows/clients.py",
        " if self._standing.limited and own else listed",
        " if False else listed",
        ("tests/flows/test_provider.py::TestStoredClient::test_the_owners_list_is_one",),
    ),
    Fault(
        "A scope that the owner set by hand is granted though the server has none such",
        "oauth_store/flows/clients.py",
        "{scope: None for scope in own if scope in listed}",
        "own",
        ("tests/flows/test_provider.py::TestStoredClient::test_the_owner_cannot_name_what_does_not_exist",),
    ),
    Fault(
        "The limit that the owner set by hand is lost with the first approval",
        "oauth_store/flows/authorization.py",
        "if row.last_used_at == NEVER:",
        "if False:",
        ("tests/flows/test_provider.py::TestStoredClient::test_the_owners_list_is_one",),
    ),
    Fault(
        "An error leads to an address that nobody approved",
        "oauth_store/server/authorize.py",
        '    return not (target.scheme == "http"',
        '    return False and not (target.scheme == "http"',
        ("tests/server/test_requests.py::TestAuthorization::test_an_error_leads_to_this_machine_alone",),
    ),
    Fault(
        "A question by OPTIONS exchanges a code",
        "oauth_store/server/routes.py",
        'if request.method == "OPTIONS":',
        "if False:",
        ("tests/server/test_requests.py::TestToken::test_only_a_post_has_a_body",),
    ),
    Fault(
        "Any number of requests waits for a document",
        "oauth_store/flows/metadata_documents.py",
        "if len(self._waiting) > WAITING:",
        "if False:",
        ("tests/flows/test_documents.py::TestBounds::test_not_everybody_may_wait",),
    ),
    Fault(
        "A code verifier of one character is accepted",
        "oauth_store/flows/code.py",
        "if not re.fullmatch(CODE_VERIFIER, code.code_verifier):",
        "if False:",
        ("tests/server/test_requests.py::TestToken::test_a_verifier_is_long_enough",),
    ),
    Fault(
        "A refresh token is good as an access token",
        "oauth_store/flows/access.py",
        "    tokens.c.kind == ACCESS,\n    tokens.c.consumed_at.is_(None),\n    tokens.c.revoked_at.is_(None),\n",
        "    tokens.c.consumed_at.is_(None),\n    tokens.c.revoked_at.is_(None),\n",
        ("tests/flows/test_refresh.py::TestLive::test_only_a_refresh_token_refreshes",),
    ),
    Fault(
        "An access token refreshes",
        "oauth_store/flows/refresh.py",
        "    tokens.c.kind == REFRESH,\n",
        "",
        ("tests/flows/test_refresh.py::TestLive::test_only_a_refresh_token_refreshes",),
    ),
    Fault(
        "A revoked refresh token refreshes",
        "oauth_store/flows/refresh.py",
        "    tokens.c.kind == REFRESH,\n    tokens.c.revoked_at.is_(None),\n",
        "    tokens.c.kind == REFRESH,\n",
        ("tests/flows/test_refresh.py::TestDead::test_revoked",),
    ),
    Fault(
        "A rotated access token is accepted",
        "oauth_store/flows/access.py",
        "    tokens.c.kind == ACCESS,\n    tokens.c.consumed_at.is_(None),\n",
        "    tokens.c.kind == ACCESS,\n",
        ("tests/flows/test_refresh.py::TestLive::test_a_new_pair_takes_the_place_of_the_old_one",),
    ),
    Fault(
        "A revoked access token is accepted",
        "oauth_store/flows/access.py",
        "    tokens.c.consumed_at.is_(None),\n    tokens.c.revoked_at.is_(None),\n",
        "    tokens.c.consumed_at.is_(None),\n",
        ("tests/flows/test_revocation.py::TestWhatItEnds::test_the_pair_and_the_code",),
    ),
    Fault(
        "An access token is good for a second too long",
        "oauth_store/flows/access.py",
        "    tokens.c.expires_at > ",
        "    tokens.c.expires_at >= ",
        ("tests/flows/test_refresh.py::TestLive::test_lifetimes_count_from_the_last_refresh",),
    ),
    Fault(
        "A refresh token is good for a second too long",
        "oauth_store/flows/refresh.py",
        "    tokens.c.expires_at > ",
        "    tokens.c.expires_at >= ",
        ("tests/flows/test_refresh.py::TestDead::test_expired",),
    ),
    Fault(
        "A remembered token is good for a second too long",
        "oauth_store/flows/access.py",
        'if fields is None or fields["expires_at"] <= now:',
        'if fields is None or fields["expires_at"] < now:',
        ("tests/database/test_memory.py::TestWhatIsRemembered::test_an_expired_token_is_refused",),
    ),
    Fault(
        "A remembered token is accepted after another process revoked it",
        "oauth_store/database/remembered.py",
        "return fields if version is not None and version == self.version() else None",
        "return fields",
        ("tests/database/test_memory.py::TestProof::test_what_another_process_ended_is_refused",),
    ),
    Fault(
        "A commit between the counter and the row goes unnoticed",
        "oauth_store/flows/access.py",
        "remembered.remember(row.token_hash, _fields(row), version)",
        "remembered.remember(row.token_hash, _fields(row), remembered.version())",
        ("tests/database/test_memory.py::TestProof::test_a_commit_right_after_the_row",),
    ),
    Fault(
        "A session of the connected apps outlives the password",
        "oauth_store/pages/sessions.py",
        "if way is None or not way.signed(row.subject, value):",
        "if way is None:",
        (
            "tests/pages/test_sign_in.py::TestLimits::test_a_known_browser_ends_with_the_password",
            "tests/pages/test_passkeys.py::TestApps::test_a_session_in_another_way",
        ),
    ),
    Fault(
        "A session of the connected apps never ends",
        "oauth_store/flows/sessions.py",
        'tokens.c.expires_at > bindparam("b_now")',
        'tokens.c.expires_at > bindparam("b_now") - bindparam("b_now")',
        ("tests/pages/test_apps.py::TestSession::test_it_ends_after_fifteen_minutes",),
    ),
    # Refresh
    Fault(
        "A narrowed refresh narrows the refresh token too",
        "oauth_store/flows/tokens.py",
        '"scopes": grant.scopes,',
        '"scopes": " ".join(scopes),',
        ("tests/flows/test_refresh.py::TestLive::test_the_refresh_token_keeps_the_original_scopes",),
    ),
    Fault(
        "A refresh may ask for more scopes than were granted",
        "oauth_store/flows/refresh.py",
        "if token.checked and not asked.keys() <= set(granted):",
        "if False:",
        ("tests/flows/test_refresh.py::TestLive::test_more_scopes_than_were_granted",),
    ),
    Fault(
        "A refresh forgets who approved",
        "oauth_store/flows/tokens.py",
        '"subject": grant.subject,',
        '"subject": None if granted_at else grant.subject,',
        ("tests/flows/test_refresh.py::TestLive::test_resource_and_subject_are_carried",),
    ),
    Fault(
        "Two refreshes at once give two pairs",
        "oauth_store/flows/refresh.py",
        ".where(*_is_known, tokens.c.consumed_at.is_(None), tokens.c.scopes",
        ".where(*_is_known, tokens.c.scopes",
        ("tests/flows/test_refresh.py::TestLive::test_who_was_overtaken_gets_nothing_new",),
    ),
    Fault(
        "On SQLite, who loses the race for a refresh token goes on",
        "oauth_store/flows/tokens.py",
        "if result.rowcount == 0:",
        "if False:",
        ("tests/flows/test_refresh.py::TestLive::test_who_was_overtaken_gets_nothing_new",),
    ),
    Fault(
        "On a server, who loses the race for a refresh token goes on",
        "oauth_store/flows/tokens.py",
        "if result.rowcount == 0:  # type: ignore[attr-defined]  # an UPDATE's result is a CursorResult",
        "if result is None:",
        ("tests/flows/test_refresh.py::TestLive::test_who_was_overtaken_gets_nothing_new",),
    ),
    Fault(
        "Who loses a race is not tried again",
        "oauth_store/database/store.py",
        "            except LostRaceError:\n                continue\n",
        "            except LostRaceError:\n                break\n",
        ("tests/database/test_database.py::test_who_loses_a_race_begins_anew",),
    ),
    Fault(
        "A refresh ends everybody's access tokens",
        "oauth_store/flows/refresh.py",
        '.where(tokens.c.token_hash == bindparam("b_hash"), tokens.c.kind == ACCESS, tokens.c.consumed_at.is_(None))',
        '.where(bindparam("b_hash").is_not(None), tokens.c.kind == ACCESS, tokens.c.consumed_at.is_(None))',
        ("tests/flows/test_refresh.py::TestLive::test_it_concerns_no_other_grant",),
    ),
    Fault(
        "One token's first use is noted on everybody's",
        "oauth_store/flows/access.py",
        '.where(tokens.c.token_hash == bindparam("b_hash"), tokens.c.first_used_at.is_(None))',
        '.where(bindparam("b_hash").is_not(None), tokens.c.first_used_at.is_(None))',
        ("tests/flows/test_refresh.py::TestLive::test_it_concerns_no_other_grant",),
    ),
    Fault(
        "The grace lasts a second too long",
        "oauth_store/flows/tokens.py",
        "< now - consumed_at < issuer",
        "< now - consumed_at <= issuer",
        ("tests/flows/test_refresh.py::TestReuse::test_just_within_and_just_after_the_grace",),
    ),
    Fault(
        "A used refresh token is answered again outside the grace",
        "oauth_store/flows/refresh.py",
        "used = successor is None or successor.refresh.first_used_at is not None",
        "used = successor is None",
        ("tests/flows/test_refresh.py::TestReuse::test_the_grant_ends",),
    ),
    Fault(
        "Reuse of a refresh token does not end the grant",
        "oauth_store/flows/refresh.py",
        '        revoke_grants(session, [row.grant_id], "reuse detected", now)\n',
        "",
        ("tests/flows/test_refresh.py::TestReuse::test_the_grant_ends",),
    ),
    Fault(
        "A replay is answered whatever scopes it asks for",
        "oauth_store/flows/refresh.py",
        "if not successor.has(asked, row.scopes.split()):",
        "if False:",
        ("tests/flows/test_refresh.py::TestWithinGrace::test_other_scopes_than_the_pair_has",),
    ),
    Fault(
        "A replay is answered with a pair that has expired",
        "oauth_store/flows/refresh.py",
        "self.refresh.revoked_at is None and self.refresh.expires_at > now",
        "self.refresh.revoked_at is None",
        ("tests/flows/test_refresh.py::TestLostAnswer::test_its_refresh_token_has_expired",),
    ),
    Fault(
        "The first use of an access token is not stored",
        "oauth_store/flows/access.py",
        "issuer.store.start_write(_stamp_use, token_hash, ",
        "(lambda *_: None)(token_hash, ",
        ("tests/flows/test_refresh.py::TestReuse::test_the_grant_ends",),
    ),
    # Personal tokens
    Fault(
        "Two live tokens have one name",
        "oauth_store/flows/personal.py",
        "    if live:",
        "    if False:",
        ("tests/cli/test_cli_token.py::TestCreate::test_a_name_is_of_one_live_token",),
    ),
    Fault(
        "The use of a personal token is recorded once alone",
        "oauth_store/flows/access.py",
        'tokens.c.first_used_at.is_(None) | (tokens.c.first_used_at <= bindparam("b_now") - USE_SECONDS)',
        "tokens.c.first_used_at.is_(None)",
        ("tests/cli/test_cli_token.py::TestList::test_the_last_use_is_right_to_five_minutes",),
    ),
    Fault(
        "A personal token has scopes that the page did not offer",
        "oauth_store/pages/apps.py",
        "if scopes is None or (choices and not scopes):",
        "if False:",
        ("tests/pages/test_scopes.py::TestTokens::test_what_cannot_be_made",),
    ),
    # What it allows
    Fault(
        "A refresh that runs at the same moment gives back a scope that the owner took away",
        "oauth_store/flows/refresh.py",
        ', tokens.c.scopes == bindparam("b_granted"))',
        ")",
        ("tests/flows/test_scopes.py::TestAtTheSameMoment::test_a_refresh_that_has_read_the_scopes",),
    ),
    Fault(
        "An access token keeps a scope that the owner took away",
        "oauth_store/flows/scopes.py",
        "[scope for scope in access.scopes.split() if scope in after]",
        "access.scopes.split()",
        ("tests/flows/test_scopes.py::TestChange::test_it_counts_at_the_next_call",),
    ),
    Fault(
        "A repeated refresh has the scopes of before",
        "oauth_store/flows/refresh.py",
        "_narrowed(session, successor.refresh.scopes.split(), token, row)",
        "_narrowed(session, row.scopes.split(), token, row)",
        ("tests/flows/test_scopes.py::TestChange::test_a_repeated_refresh_has_the_scopes_of_now",),
    ),
    Fault(
        "A user can change the scopes of another user's app",
        "oauth_store/flows/scopes.py",
        "live_grants(session, subject=subject, grant_id=grant_id",
        "live_grants(session, grant_id=grant_id",
        ("tests/flows/test_scopes.py::TestChange::test_another_user_or_server_changes_nothing",),
    ),
    Fault(
        "The owner can grant a scope that the server does not have",
        "oauth_store/flows/authorization.py",
        "    if unknown:",
        "    if False:",
        ("tests/flows/test_scopes.py::TestApproval::test_a_scope_that_the_server_does_not_have",),
    ),
    Fault(
        "A required scope can be unticked",
        "oauth_store/flows/authorization.py",
        "chosen = {*scopes, *issuer.scopes.required, OFFLINE_ACCESS}",
        "chosen = {*scopes, OFFLINE_ACCESS}",
        ("tests/flows/test_scopes.py::TestApproval::test_a_required_scope_is_always_granted",),
    ),
    Fault(
        "A form can name a scope that the page did not offer",
        "oauth_store/pages/choices.py",
        "if not {choice.scope for choice in self}.issuperset(posted):",
        "if False:",
        (
            "tests/pages/test_scopes.py::TestApps::test_what_cannot_be_saved",
            "tests/pages/test_scopes.py::TestConsent::test_what_cannot_be_granted",
        ),
    ),
    Fault(
        "A client that repeats its last scopes loses what the owner has added",
        "oauth_store/flows/refresh.py",
        "if scope in asked or scope in unheard",
        "if scope in asked",
        ("tests/flows/test_scopes.py::TestChange::test_a_client_that_repeats_the_last_response",),
    ),
    Fault(
        "A form of the owner's own template grants what is not ticked",
        "oauth_store/pages/consent.py",
        'shown = "choices" in form or "scope" in form',
        'shown = "choices" in form',
        ("tests/pages/test_scopes.py::TestConsent::test_a_template_with_boxes_of_its_own",),
    ),
    Fault(
        "A tool that can delete hides behind others",
        "oauth_store/pages/choices.py",
        "key=lambda tool: (KINDS.index(tool[0]), tool[1])",
        "key=lambda tool: (-KINDS.index(tool[0]), tool[1])",
        ("tests/pages/test_scopes.py::TestConsent::test_the_dangerous_tools_come_first",),
    ),
    Fault(
        "Each load of a page has the tools listed",
        "oauth_store/pages/choices.py",
        "if listing is None or not listing.serves(wanted):",
        "if True:",
        ("tests/pages/test_scopes.py::TestConsent::test_pages_share_a_list_of_the_tools",),
    ),
    # Revocation
    Fault(
        "A revocation ends the pair alone",
        "oauth_store/flows/revocation.py",
        '    revoke_grants(session, [row.grant_id], "revoked by the client", now)',
        "    session.execute(\n        tokens.update()\n        "
        ".where(tokens.c.token_hash.in_([row.token_hash, row.paired_hash]))\n        "
        '.values(revoked_at=now, revoked_reason="revoked by the client")\n    )',
        ("tests/flows/test_revocation.py::TestWhatItEnds::test_all_that_was_rotated",),
    ),
    Fault(
        "A revocation misses what a refresh under way inserts",
        "oauth_store/flows/connected.py",
        "while connection.execute(_revoke_tokens, revoke).rowcount and not takes_turns:",
        "if connection.execute(_revoke_tokens, revoke).rowcount:",
        ("tests/flows/test_revocation.py::TestItWins::test_against_a_refresh_that_has_begun",),
    ),
    Fault(
        "A revocation and a refresh take rows in different orders",
        "oauth_store/flows/connected.py",
        "for kind in (REFRESH, ACCESS):",
        "for kind in (ACCESS, REFRESH):",
        ("tests/flows/test_revocation.py::TestItWins::test_against_a_refresh",),
    ),
    Fault(
        "A revocation forgets the code that waits for its client",
        "oauth_store/flows/connected.py",
        "        connection.execute(_close_codes, values)\n",
        "",
        ("tests/flows/test_revocation.py::TestWhatItEnds::test_a_code_that_was_not_redeemed",),
    ),
    Fault(
        "A second revocation overwrites when and why",
        "oauth_store/flows/connected.py",
        "        tokens.c.revoked_at.is_(None),\n",
        "",
        ("tests/flows/test_revocation.py::TestWhatItEnds::test_twice",),
    ),
    Fault(
        "Users revoke each other's grants",
        "oauth_store/flows/connected.py",
        "for column, value in ((model.subject, subject), (model.client_id, client_id)):",
        "for column, value in ((model.client_id, client_id),):",
        ("tests/pages/test_apps.py::TestGrants::test_users_see_their_own",),
    ),
    # Transactions and tasks
    Fault(
        "A revocation is not awaited",
        "oauth_store/server/revoke.py",
        "await revocation.revoke(",
        "revocation.revoke(",
        ("tests/server/test_endpoints.py::TestRevoke::test_a_public_client_revokes",),
    ),
    Fault(
        "Signing out is not awaited",
        "oauth_store/pages/apps.py",
        "await self._sign_in.sessions.end(",
        "self._sign_in.sessions.end(",
        ("tests/pages/test_apps.py::TestSession::test_signing_out_ends_it_and_no_other",),
    ),
    Fault(
        "Signing out ends everybody's session",
        "oauth_store/flows/sessions.py",
        'delete(tokens).where(tokens.c.token_hash == bindparam("b_hash"), tokens.c.kind.in_(',
        'delete(tokens).where(bindparam("b_hash").is_not(None), tokens.c.kind.in_(',
        ("tests/pages/test_apps.py::TestSession::test_signing_out_ends_it_and_no_other",),
    ),
    Fault(
        "A client that hangs up cancels its step",
        "oauth_store/database/store.py",
        "return await asyncio.shield(self._start(step, True, *args, **kwargs))",
        "return await self._start(step, True, *args, **kwargs)",
        ("tests/database/test_database.py::TestCancelledRequests::test_a_step_that_has_begun_is_finished",),
    ),
    Fault(
        "A step on an SQLite file is no transaction",
        "oauth_store/database/sqlite.py",
        'and not statement.startswith("SELECT"):',
        "and not statement:",
        ("tests/database/test_database.py::TestTransactions::test_an_error_rolls_back",),
    ),
    Fault(
        "The COMMIT of a migration is left out",
        "migrations/env.py",
        "        context.run_migrations()\n    connection.commit()\n",
        "        context.run_migrations()\n",
        ("tests/database/test_migrations.py::test_each_revision_goes_up_down_and_up",),
    ),
    Fault(
        "A COMMIT that SQLite refused keeps the lock, and what it should have committed",
        "oauth_store/database/sqlite.py",
        'event.listen(self.engine, "checkin", _end_transaction)',
        "pass",
        ("tests/database/test_database.py::test_a_commit_that_is_refused_is_rolled_back",),
    ),
    Fault(
        "A code that is exchanged while all grants are ended lives on",
        "oauth_store/flows/connected.py",
        "((Code, chosen_codes), (Token, chosen_tokens))",
        "((Token, chosen_tokens), (Code, chosen_codes))",
        ("tests/flows/test_revocation.py::TestItWins::test_against_an_exchange_that_comes_between_its_looks",),
    ),
    Fault(
        "A step that failed keeps its connection and its lock",
        "oauth_store/database/store.py",
        "                session.close()  # rolls back what was not committed\n",
        "                pass\n",
        ("tests/database/test_database.py::test_a_commit_that_fails_leaves_no_transaction_open",),
    ),
    Fault(
        "On SQLite, a step that only looks takes the lock",
        "oauth_store/database/sqlite.py",
        ' and not statement.startswith("SELECT"):',
        ":",
        ("tests/database/test_database.py::test_who_reads_first_may_still_write",),
    ),
    Fault(
        "The transactions of an SQLite engine that was passed in begin deferred",
        "oauth_store/database/engines.py",
        'exec_driver_sql("BEGIN IMMEDIATE")',
        'exec_driver_sql("BEGIN")',
        ("tests/database/test_database.py::test_who_reads_first_may_still_write",),
    ),
    Fault(
        "A deadlock is not tried again",
        "oauth_store/database/outages.py",
        '{"40001", "40P01"}',
        '{"40001"}',
        ("tests/database/test_database.py::test_a_deadlock_is_tried_again",),
    ),
    Fault(
        "A serialization failure is not tried again",
        "oauth_store/database/outages.py",
        '{"40001", "40P01"}',
        '{"40P01"}',
        ("tests/database/test_database.py::test_a_serialization_failure_is_tried_again",),
    ),
    Fault(
        "A COMMIT that got no answer is tried again",
        "oauth_store/database/store.py",
        "if hung_up(error):  # it may have been committed",
        "if False:  # it may have been committed",
        ("tests/system/test_hangups.py::test_at_the_commit",),
    ),
    Fault(
        "Closing the provider does not wait for what is under way",
        "oauth_store/database/store.py",
        "while ours := {step for step in self._steps if step.get_loop() is loop}:",
        "while ours := set():",
        ("tests/database/test_database.py::test_closing_waits_for_what_is_under_way",),
    ),
    Fault(
        "A file that was replaced is used",
        "oauth_store/database/store.py",
        "        if present != inode:\n",
        "        if False:\n",
        ("tests/database/test_database.py::TestFiles::test_a_file_that_was_replaced_is_not_used",),
    ),
    Fault(
        "What is written to a file that has gone meanwhile is acknowledged",
        "oauth_store/database/store.py",
        "                self._check_file(inode)  # it may have waited long for its turn\n",
        "",
        ("tests/database/test_database.py::TestFiles::test_a_file_that_goes_while_it_is_written_to",),
    ),
    Fault(
        "An outage is an unknown token",
        "oauth_store/flows/access.py",
        "            raise _Unverifiable(*error.args) from error",
        "            return None",
        ("tests/database/test_memory.py::TestWhereItIsNot::test_a_file_that_is_gone_or_was_replaced",),
    ),
    # What is stored
    Fault(
        "A client's secret is stored in clear",
        "oauth_store/flows/registration.py",
        'client.model_dump_json(exclude={"client_secret"}, exclude_none=True)',
        "client.model_dump_json(exclude_none=True)",
        ("tests/flows/test_provider.py::TestRegistration::test_the_secret_is_a_hash",),
    ),
    Fault(
        "Whoever has the file can open the pair that is sealed in it",
        "oauth_store/sealing.py",
        ".derive(presented.encode())",
        '.derive(b"")',
        ("tests/flows/test_refresh.py::TestSeal::test_its_key_is_made_of_the_presented_token",),
    ),
    Fault(
        "Tokens are stored in clear",
        "oauth_store/credentials.py",
        "return hashlib.sha256(secret.encode()).digest()",
        "return secret.encode()",
        ("tests/database/test_database.py::TestFiles::test_no_secret_is_in_the_files",),
    ),
    Fault(
        "A client that registers again overwrites all clients",
        "oauth_store/flows/registration.py",
        '.where(clients.c.client_id == bindparam("b_client_id"))\n    .values(\n',
        '.where(bindparam("b_client_id").is_not(None))\n    .values(\n',
        ("tests/flows/test_provider.py::TestRegistration::test_registering_again_changes_no_other_client",),
    ),
    Fault(
        "A document that is withdrawn takes the redirect URIs of all clients",
        "oauth_store/flows/registration.py",
        '.where(clients.c.client_id == bindparam("b_client_id"))\n    '
        '.values(client_metadata=bindparam("b_client_metadata"))',
        '.where(bindparam("b_client_id").is_not(None))\n    .values(client_metadata=bindparam("b_client_metadata"))',
        ("tests/flows/test_documents.py::TestHostAway::test_a_document_takes_away_only_its_own",),
    ),
    Fault(
        "Any number of documents is fetched at a time",
        "oauth_store/flows/metadata_documents.py",
        "if not of_address and len(under_way) < FETCHES:",
        "if not of_address:",
        ("tests/flows/test_documents.py::TestBounds::test_hosts_that_hang_hold_up_nobody",),
    ),
    Fault(
        "One address fetches as many documents at a time as it likes",
        "oauth_store/flows/metadata_documents.py",
        "if not of_address and len(under_way) < FETCHES:",
        "if len(under_way) < FETCHES:",
        ("tests/flows/test_documents.py::TestBounds::test_one_address_fetches_one_document_at_a_time",),
    ),
    Fault(
        "A document that could not be had is asked for again and again",
        "oauth_store/flows/metadata_documents.py",
        "            if seconds > 0:",
        "            if seconds > FAILURE_SECONDS:",
        ("tests/flows/test_documents.py::TestHostAway::test_an_answer_without_a_document",),
    ),
    Fault(
        "Documents are stored without a limit",
        "oauth_store/flows/documented_clients.py",
        "        count_new()",
        "        pass",
        ("tests/flows/test_documents.py::TestBounds::test_new_documents_count_as_registrations",),
    ),
    Fault(
        "One approval marks all clients as used",
        "oauth_store/flows/authorization.py",
        'update(clients).where(clients.c.client_id == bindparam("b_client_id")).values(last_used_at',
        'update(clients).where(bindparam("b_client_id").is_not(None)).values(last_used_at',
        ("tests/database/test_purge.py::test_a_registration_that_nobody_approved_goes_after_thirty_days",),
    ),
    Fault(
        "The database file is for everyone to read",
        "oauth_store/database/engines.py",
        "os.O_RDWR, 0o600))",
        "os.O_RDWR, 0o644))",
        ("tests/database/test_database.py::TestFiles::test_the_files_are_the_owners_alone",),
    ),
    Fault(
        "The file behind a link is for everyone to read",
        "oauth_store/database/engines.py",
        "    if path.is_symlink():",
        "    if False:",
        ("tests/database/test_database.py::TestFiles::test_a_link_to_a_file_that_is_not_there_yet",),
    ),
    Fault(
        "What is deleted stays in the file",
        "oauth_store/database/engines.py",
        '"secure_delete = ON"',
        '"secure_delete = OFF"',
        ("tests/database/test_database.py::TestFiles::test_the_settings_of_a_file",),
    ),
    Fault(
        "A power cut may bring a revoked token back",
        "oauth_store/database/engines.py",
        '"synchronous = FULL"',
        '"synchronous = NORMAL"',
        (
            "tests/database/test_database.py::TestFiles::test_the_settings_of_a_file",
            "tests/system/test_power_cut.py::test_nothing_acknowledged_is_lost",
        ),
    ),
    Fault(
        "An error of SQLite prints values",
        "oauth_store/database/engines.py",
        "engine = create_async_engine(file, hide_parameters=True, ",
        "engine = create_async_engine(file, ",
        ("tests/database/test_database.py::test_sqlite_errors_do_not_print_values",),
    ),
    Fault(
        "An error of a server prints values",
        "oauth_store/database/engines.py",
        "engine = create_async_engine(url, hide_parameters=True, **options)",
        "engine = create_async_engine(url, **options)",
        ("tests/database/test_database.py::test_errors_do_not_print_values",),
    ),
    Fault(
        "A new access token is in the log",
        "oauth_store/flows/code.py",
        'emit_after_commit(session, "tokens_issued", **names)\n    pair = '
        'Pair.mint(with_refresh_token="refresh_token" in client.grant_types)',
        'pair = Pair.mint(with_refresh_token="refresh_token" in client.grant_types)\n    '
        'emit_after_commit(session, "tokens_issued", **names | {"subject": pair.access_token})',
        ("tests/flows/test_provider.py::test_no_secret_is_logged",),
    ),
    # Purge and migrations
    Fault(
        "The purge deletes a token that is live still",
        "oauth_store/database/models.py",
        "        return model.expires_at <= now\n",
        "        return model.expires_at <= now + 1\n",
        ("tests/database/test_purge.py::test_what_has_expired_is_deleted",),
    ),
    Fault(
        "The purge deletes clients that were approved",
        "oauth_store/database/models.py",
        "    return Client.last_used_at.is_(None) & (",
        "    return (",
        (
            "tests/database/test_purge.py::test_a_client_that_was_ever_approved_is_never_deleted",
            "tests/database/test_purge.py::test_a_registration_that_nobody_approved_goes_after_thirty_days",
        ),
    ),
    Fault(
        "The purge wipes a sealed pair that is needed still",
        "oauth_store/database/purge.py",
        '        Token.consumed_at < bindparam("b_created_at"),\n',
        '        Token.consumed_at <= bindparam("b_created_at"),\n',
        ("tests/database/test_purge.py::test_a_lost_answer_is_found_again_after_purges",),
    ),
    Fault(
        "An upgrade from VS-2 loses tokens without an expiry",
        "migrations/versions/0002_hashed.py",
        "(row.expires_at is None or row.expires_at > now)",
        "(row.expires_at or 0) > now",
        ("tests/database/test_migrations.py::test_a_token_without_an_expiry_gets_one",),
    ),
    Fault(
        "An upgrade from VS-2 leaves clients to the purge",
        "migrations/versions/0002_hashed.py",
        '"last_used_at": int(row.created_at),',
        '"last_used_at": None,',
        ("tests/database/test_migrations.py::test_a_client_of_vs2_is_never_purged",),
    ),
    Fault(
        "An upgrade from VS-2 leaves secrets in the free pages of the file",
        "migrations/env.py",
        '    connection.exec_driver_sql("VACUUM")\n',
        "",
        ("tests/database/test_migrations.py::test_no_secret_is_left_in_the_file",),
    ),
    Fault(
        "A downgrade to 0002 loses all tokens",
        "migrations/versions/0003_sessions.py",
        "DELETE FROM oauth_tokens WHERE client_id IS NULL",
        "DELETE FROM oauth_tokens",
        ("tests/database/test_migrations.py::test_0003_keeps_every_token",),
    ),
    # Approval
    Fault(
        "A request may be answered in any browser",
        "oauth_store/flows/authorization.py",
        "browser is None or not matches(browser, row.browser_hash)",
        "browser is None",
        ("tests/pages/test_consent.py::TestWhoAnswers::test_another_browser",),
    ),
    Fault(
        "The consent page takes a form without its token",
        "oauth_store/pages/consent.py",
        'if not from_our_page(request, self._url) or not same(form.get("csrf", ""), csrf):',
        "if not from_our_page(request, self._url):",
        ("tests/pages/test_consent.py::TestWhoAnswers::test_the_token_of_the_form",),
    ),
    Fault(
        "The consent page takes a form that another page sent",
        "oauth_store/pages/consent.py",
        'if not from_our_page(request, self._url) or not same(form.get("csrf", ""), csrf):',
        'if not same(form.get("csrf", ""), csrf):',
        ("tests/pages/test_consent.py::TestWhoAnswers::test_a_form_of_another_page",),
    ),
    Fault(
        "The pages may be framed",
        "oauth_store/pages/html.py",
        "\"base-uri 'none'; frame-ancestors 'none'\"",
        "\"base-uri 'none'\"",
        ("tests/pages/test_pages.py::TestHeaders::test_every_page",),
    ),
    Fault(
        "Scripts may read the cookies",
        "oauth_store/browser.py",
        "            httponly=True,\n",
        "",
        ("tests/pages/test_apps.py::TestPaths::test_on_https",),
    ),
    Fault(
        "Wrong passwords are not counted",
        "oauth_store/rate_limits.py",
        "            self._strategy.hit(limit, key)\n",
        "            pass\n",
        ("tests/pages/test_sign_in.py::TestLimits::test_one_address",),
    ),
    Fault(
        "A user who signs in may go on to guess another's password",
        "oauth_store/pages/sign_in.py",
        "if way.guessable and (is_known or not self.asks_user):",
        "if way.guessable:",
        ("tests/pages/test_sign_in.py::TestUsers::test_signing_in_between_does_not_help",),
    ),
    Fault(
        "A long row of marks takes the square of its length",
        "oauth_store/display.py",
        "if marks > MARKS_IN_A_ROW:",
        "if False:",
        ("tests/pages/test_sign_in.py::TestMarks::test_of_a_name_and_a_password",),
    ),
    Fault(
        "X-Forwarded-For is believed of everyone",
        "oauth_store/rate_limits.py",
        "while forwarded and self._is_trusted(address):",
        "while forwarded:",
        ("tests/server/test_floods.py::test_only_trusted_proxies_are_believed",),
    ),
    Fault(
        "Of several lines of X-Forwarded-For, the visitor's own counts",
        "oauth_store/rate_limits.py",
        'request.headers.getlist("x-forwarded-for")',
        '[request.headers.get("x-forwarded-for", "")]',
        ("tests/server/test_floods.py::test_nobody_chooses_an_address",),
    ),
    Fault(
        "All of IPv4 is one address on a dual-stack listener",
        "oauth_store/rate_limits.py",
        "else address.ipv4_mapped or address",
        "else address",
        ("tests/server/test_floods.py::test_nobody_chooses_an_address",),
    ),
    Fault(
        "What came through a tunnel is let in without asking",
        "oauth_store/approval.py",
        "    if forwarded:\n",
        "    if False:\n",
        ("tests/flows/test_approval.py::TestLoopbackOnly::test_what_came_through_a_tunnel_is_refused",),
    ),
    Fault(
        "A server on a public URL starts without an approval",
        "oauth_store/pages/default.py",
        "    if public:\n",
        "    if False:\n",
        ("tests/flows/test_approval.py::TestDefault::test_a_public_url_fails_closed",),
    ),
    # Redirects
    Fault(
        "A redirect URI of javascript: is registered",
        "oauth_store/flows/redirect_uris.py",
        "        if refused:",
        "        if False:",
        ("tests/server/test_conformance.py::TestRegistration::test_bad_redirect_uris_are_refused",),
    ),
    Fault(
        "Links of an app's own hide what stands for a host",
        "oauth_store/display.py",
        'return f"{link.scheme}://{link.netloc}" if link.netloc else f"{link.scheme}:"',
        'return f"{link.scheme}:"',
        ("tests/pages/test_pages.py::TestWhatIsShown::test_targets",),
    ),
    Fault(
        "A well-known host is known at every port",
        "oauth_store/pages/wording.py",
        "if named in known_hosts",
        "if host in known_hosts",
        ("tests/pages/test_pages.py::TestWhatIsShown::test_targets",),
    ),
    Fault(
        "Any port will do, not on loopback alone",
        "oauth_store/flows/redirect_uris.py",
        'if presented.scheme != "http" or not is_loopback_host(registered.hostname) or "@" in presented.netloc:',
        'if "@" in presented.netloc:',
        ("tests/flows/test_provider.py::TestStoredClient::test_redirect_uris",),
    ),
    Fault(
        "A redirect does not say which issuer it is of",
        "oauth_store/flows/authorization.py",
        "return build_client_redirect(row.redirect_uri, params, iss=issuer.url)",
        'return build_client_redirect(row.redirect_uri, params, iss="").replace("&iss=", "")',
        ("tests/flows/test_provider.py::TestApprove::test_the_redirect_names_the_issuer",),
    ),
    Fault(
        "A redirect loses the state",
        "oauth_store/flows/authorization.py",
        "    if row.state is not None:\n",
        "    if False:\n",
        ("tests/flows/test_provider.py::TestApprove::test_the_redirect_names_the_issuer",),
    ),
    Fault(
        "Answers with tokens may be kept by proxies",
        "oauth_store/server/routes.py",
        '    if "POST" in methods:\n',
        "    if False:\n",
        ("tests/server/test_conformance.py::TestRegistration::test_nobody_else_may_keep_the_answer",),
    ),
    # Connections
    Fault(
        "A fork uses the connections that it inherited",
        "oauth_store/database/store.py",
        "        forks.register(self)\n",
        "",
        ("tests/database/test_connections.py::TestForks::test_a_fork_begins_anew",),
    ),
    Fault(
        "Connections that are older than a forgotten one are used",
        "oauth_store/database/engines.py",
        'if record.info["opened"] < self._since:',
        "if False:",
        ("tests/database/test_connections.py::TestForgottenConnections::test_one_timeout_is_enough",),
    ),
    Fault(
        "Two event loops share the connections of a server",
        "oauth_store/database/store.py",
        "if before is not None and before.is_running():",
        "if False:",
        ("tests/database/test_connections.py::TestSeveralLoops::test_a_server_refuses_the_second",),
    ),
    # URLs
    Fault(
        "A password with an @ in it is read as a host",
        "oauth_store/database/url.py",
        'if rest.count("@") < 2 else None',
        "if True else None",
        ("tests/database/test_url.py::test_a_misread_password_is_nowhere",),
    ),
    Fault(
        "channel_binding=require is left out",
        "oauth_store/database/options.py",
        '        mode = "verify-full"\n    if files.get("rootcert") == _SYSTEM:',
        '    if files.get("rootcert") == _SYSTEM:',
        ("tests/database/test_url.py::test_the_urls_of_hosters_are_understood",),
    ),
    Fault(
        "verify-full takes any host's name",
        "oauth_store/database/options.py",
        'context.check_hostname = mode == "verify-full"',
        "context.check_hostname = False",
        ("tests/database/test_url.py::test_the_urls_of_hosters_are_understood",),
    ),
    Fault(
        "A URL chooses the character set",
        "oauth_store/database/options.py",
        '{"charset": "utf8mb4", **_mysql_security(options)}',
        "_mysql_security(options)",
        ("tests/database/test_url.py::test_the_urls_of_hosters_are_understood",),
    ),
    # A clock that jumps
    Fault(
        "The purge believes every clock",
        "oauth_store/database/purge.py",
        "    if not is_believed(session, now):",
        "    if False:",
        ("tests/database/test_purge.py::test_a_clock_that_is_ahead_for_a_moment_costs_no_grant",),
    ),
    Fault(
        "A sign-in by a clock that jumped makes the purge believe it",
        "oauth_store/database/purge.py",
        "BELIEVED_AFTER_SECONDS = 3600",
        "BELIEVED_AFTER_SECONDS = 0",
        ("tests/database/test_purge.py::test_a_clock_that_is_ahead_for_a_moment_costs_no_grant",),
    ),
    Fault(
        "A clock that was ahead stretches the grace",
        "oauth_store/flows/tokens.py",
        "-SET_BACK_SECONDS < now - consumed_at",
        "now - consumed_at",
        ("tests/flows/test_refresh.py::TestReuse::test_a_clock_that_was_ahead_does_not_stretch_the_grace",),
    ),
    # Sessions
    Fault(
        "The server's sql_mode decides how statements are read",
        "oauth_store/database/engines.py",
        """        "sql_mode": "'STRICT_TRANS_TABLES,ERROR_FOR_DIVISION_BY_ZERO,NO_ENGINE_SUBSTITUTION'",\n""",
        "",
        ("tests/database/test_sessions.py::test_defaults_of_a_mariadb_server_change_nothing",),
    ),
    Fault(
        "An engine that was passed in commits each statement by itself",
        "oauth_store/database/store.py",
        "if write and not self.owned:",
        "if False:",
        ("tests/database/test_engines.py::test_an_engine_keeps_steps_apart",),
    ),
    Fault(
        "A pooler that nobody declared is used",
        "oauth_store/database/engines.py",
        "if self._found:",
        "if False:",
        ("tests/database/test_url_servers.py::test_pgbouncer_without_the_option",),
    ),
    # What is lost with its container
    Fault(
        "A file in memory is no finding",
        "oauth_store/database/ephemeral.py",
        'MEMORY = {"ramfs", "rootfs", "tmpfs"}',
        'MEMORY = {"ramfs", "rootfs"}',
        ("tests/database/test_ephemeral.py::test_one_warning_at_the_start",),
    ),
    Fault(
        "An emptyDir is taken for a volume",
        "oauth_store/database/ephemeral.py",
        "EMPTY_DIR in mount.root",
        "EMPTY_DIR == mount.root",
        ("tests/database/test_ephemeral.py::test_what_is_lost",),
    ),
    Fault(
        "The private /tmp of a unit is taken for a disk",
        "oauth_store/database/ephemeral.py",
        "elif PRIVATE_TMP in mount.root:",
        "elif PRIVATE_TMP == mount.root:",
        ("tests/database/test_ephemeral.py::test_what_is_lost",),
    ),
    Fault(
        "A volume without a name is taken for one with a name",
        "oauth_store/database/ephemeral.py",
        '[0-9a-f]{64}/_data$")',
        '[0-9a-f]{63}/_data$")',
        ("tests/database/test_ephemeral.py::test_what_is_lost",),
    ),
    Fault(
        "A claim inside a volume without a name is a finding",
        "oauth_store/database/ephemeral.py",
        '/_data$")',
        '/_data")',
        ("tests/database/test_ephemeral.py::test_what_is_kept",),
    ),
    Fault(
        "Only an overlay is a container's own file system",
        "oauth_store/database/ephemeral.py",
        "str(mount.point) in own or (own",
        "(own",
        ("tests/database/test_ephemeral.py::test_what_is_lost",),
    ),
    Fault(
        "What was exported from Docker is taken for a container",
        "oauth_store/database/ephemeral.py",
        'DOCKER in markers and named is not None and str(named.point) == "/etc/hostname"',
        "DOCKER in markers",
        ("tests/database/test_ephemeral.py::test_what_is_kept",),
    ),
    Fault(
        "A volume in a container is taken for its own file system",
        "oauth_store/database/ephemeral.py",
        "str(mount.point) in own or",
        "own or",
        ("tests/database/test_ephemeral.py::test_what_is_kept",),
    ),
    Fault(
        "A layer whose changes are on a disk is a finding",
        "oauth_store/database/ephemeral.py",
        "and not _is_kept(mount, mountinfo)",
        "",
        ("tests/database/test_ephemeral.py::test_what_is_kept",),
    ),
    Fault(
        "A layer whose changes are in memory is no finding",
        "oauth_store/database/ephemeral.py",
        "disk.kind not in MEMORY | LAYERS",
        "disk.kind not in LAYERS",
        ("tests/database/test_ephemeral.py::test_what_is_lost",),
    ),
    Fault(
        "The provider starts with a wrong MCP_OAUTH_EPHEMERAL",
        "oauth_store/provider.py",
        "ephemeral.is_intended()  # raises now, if its variable has a value that it cannot have",
        "",
        ("tests/database/test_ephemeral.py::test_another_value_is_an_error",),
    ),
    Fault(
        "Any value accepts that the database is lost",
        "oauth_store/database/ephemeral.py",
        'if value not in ("1", None):',
        "if not isinstance(value, str | None):",
        ("tests/database/test_ephemeral.py::test_another_value_is_an_error",),
    ),
    # The doctor
    Fault(
        "The doctor falls with one examination",
        "oauth_store/doctor/finding.py",
        "    except Exception as error:  # a broken system may raise anything",
        "    except NotImplementedError as error:",
        ("tests/doctor/test_broken.py::test_a_file_that_is_broken",),
    ),
    Fault(
        "The doctor moves a -wal that a killed server left",
        "oauth_store/doctor/database.py",
        "_watch_wal(store) if store.sqlite",
        "_watch_wal(store) if False",
        ("tests/doctor/test_broken.py::test_the_bytes_stay_as_they_are",),
    ),
    Fault(
        "The doctor waits without an end for headers that trickle",
        "oauth_store/doctor/http.py",
        "        async with asyncio.timeout_at(deadline):\n            response",
        "        async with asyncio.timeout_at(None):\n            response",
        ("tests/doctor/test_doctor_url.py::test_headers_that_trickle",),
    ),
)


@dataclass(frozen=True, slots=True)
class Run:
    """How a run of pytest ended. `failed` is the first test that failed."""

    code: int | None
    """None if it had to be stopped."""
    failed: str | None
    hung: bool
    seconds: float
    output: str

    @property
    def caught(self) -> bool:
        return self.code is None or (self.code == 1 and self.failed is not None)

    @property
    def by(self) -> str:
        if self.caught:
            return f"{self.failed or 'the time limit'}{' (hangs)' if self.hung else ''}"
        return "NOTHING: it survives" if self.code == 0 else f"NOTHING: pytest ended with {self.code}"


def broken(faults: Sequence[Fault]) -> list[str]:
    """Return what is wrong with the faults themselves, before any of them is made."""
    problems = []
    for fault in faults:
        try:
            text = (ROOT / fault.file).read_text()
        except OSError as error:
            problems.append(f"{fault.name}: {fault.file} cannot be read: {error.strerror}")
            continue
        if (found := text.count(fault.old)) != 1:
            problems.append(f"{fault.name}: in {fault.file} stands {found} times, not once: {fault.old!r}")
        elif fault.old == fault.new:
            problems.append(f"{fault.name}: it changes nothing in {fault.file}")
        else:
            try:
                compile(text.replace(fault.old, fault.new), fault.file, "exec")
            except SyntaxError as error:
                problems.append(f"{fault.name}: {fault.file} is no Python any more: {error}")
        problems += [f"{fault.name}: there is no {test}" for test in fault.tests if not _is_test(test)]
    names = [fault.name for fault in faults]
    return problems + [f"{name}: two faults have this name" for name in sorted(set(names)) if names.count(name) > 1]


def _is_test(node_id: str) -> bool:
    """Tell whether a test, or a class of tests, stands where its id says."""
    file, *names = node_id.split("::")
    path = ROOT / file
    body = ast.parse(path.read_text()).body if path.is_file() else []
    for name in names:
        found = [one for one in body if isinstance(one, _NAMED) and one.name == name]
        if not found:
            return False
        body = found[0].body
    return bool(body)


_NAMED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@contextmanager
def copied() -> Iterator[Path]:
    """Copy what git knows, or would, into a directory of its own."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    with tempfile.TemporaryDirectory(prefix="mutant-", ignore_cleanup_errors=True) as directory:
        copy = Path(directory)
        for name in filter(None, names):
            if (ROOT / name).is_file():  # deleted, and not committed yet
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, copy / name)
        for name in LINKED:
            if (ROOT / name).exists() and (copy / name).parent.is_dir():
                (copy / name).symlink_to(ROOT / name)
        yield copy


def environment_of(copy: Path) -> dict[str, str]:
    """Return an environment in which this copy of the package is imported, by all processes of a test."""
    dropped = ("PYTEST_ADDOPTS", "PYTHONPATH", "MCP_OAUTH_DB", "MCP_OAUTH_PASSWORD_HASH")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {"PYTHONPATH": str(copy)}


def check_import(copy: Path) -> None:
    """Exit unless processes import the copy of the package, wherever they run."""
    program = "import oauth_store; print(oauth_store.__file__)"
    for directory in (copy, copy / "tests", Path(tempfile.gettempdir())):
        command = [sys.executable, "-c", program]
        ran = subprocess.run(command, cwd=directory, env=environment_of(copy), capture_output=True, text=True)
        expected = copy / "oauth_store" / "__init__.py"
        if ran.returncode or Path(ran.stdout.strip()).resolve() != expected.resolve():
            sys.exit(f"in {directory}, {expected} is not what is imported: {ran.stdout}{ran.stderr}")


def run_tests(copy: Path, tests: Sequence[str], seconds: float) -> Run:
    """Run some tests in a copy until one fails, on the databases that the suite would use."""
    options = ["-x", "-q", "-rfE", "-p", "no:cacheprovider", "-o", "addopts=", "-o", f"timeout={TEST_SECONDS}"]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=copy,
            env=environment_of(copy),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        code: int | None
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _stop(process)
        output.seek(0)
        text = output.read()
    failed = re.search(r"^(?:FAILED|ERROR) (tests/\S+::\S+)", text, re.MULTILINE)
    hung = code is None or re.search(r"^(?:E +)?Failed: Timeout ", text, re.MULTILINE) is not None
    return Run(code, failed and failed[1], hung, time.monotonic() - started, text)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Let pytest stop what its fixtures started, and then kill what is left of its session."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(LEAVE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def make_fault(fault: Fault, *, whole_suite: bool) -> Run:
    """Make one fault in a copy, and run the tests that should catch it."""
    with copied() as copy:
        file = copy / fault.file
        file.write_text(file.read_text().replace(fault.old, fault.new))
        return run_tests(copy, ("tests",) if whole_suite else fault.tests, _seconds(whole_suite))


def _seconds(whole_suite: bool) -> float:
    return SUITE_SECONDS if whole_suite else RUN_SECONDS


def chosen(names: Sequence[str]) -> list[tuple[int, Fault]]:
    """Return the faults with these numbers, or with these words in their name; all if there are none."""
    numbered = list(enumerate(FAULTS, 1))
    if not names:
        return numbered
    found: dict[int, Fault] = {}
    for name in names:
        some = {n: fault for n, fault in numbered if name == str(n) or (not name.isdigit() and name in fault.name)}
        if not some:
            sys.exit(f"no fault is number {name}, or has that in its name; see --list")
        found |= some
    return sorted(found.items(), key=lambda one: one[0])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("faults", nargs="*", help="numbers, or words of a name; all if none is given")
    parser.add_argument("--all", action="store_true", help="run the whole suite for each fault: takes hours")
    parser.add_argument("--list", action="store_true", help="only say which faults there are")
    arguments = parser.parse_args()
    faults = chosen(arguments.faults)
    if problems := broken(FAULTS):
        sys.exit("\n".join(["These faults no longer apply; mend tests/mutants.py:", *problems]))
    if arguments.list:
        for number, fault in faults:
            print(f"{number:3}  {fault.name}\n     {fault.file}; {' '.join(fault.tests)}")
        return

    tests = ("tests",) if arguments.all else tuple(dict.fromkeys(test for _, fault in faults for test in fault.tests))
    with copied() as copy:
        check_import(copy)
        print(f"without a fault: {'the whole suite' if arguments.all else f'{len(tests)} tests'}...", flush=True)
        sound = run_tests(copy, tests, len(faults) * _seconds(arguments.all))
    if sound.code != 0:
        sys.exit(f"{sound.output}\nThe tests fail without any fault: mend them first.")
    print(f"all pass, {sound.seconds:.1f} s", flush=True)

    survived = []
    width = max(len(fault.name) for _, fault in faults)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        runs = [threads.submit(make_fault, fault, whole_suite=arguments.all) for _, fault in faults]
        try:
            for (number, fault), run in zip(faults, (each.result() for each in runs), strict=True):
                print(f"{number:3}  {fault.name:{width}}  {run.seconds:6.1f} s  {run.by}", flush=True)
                if not run.caught:
                    if run.code != 0:
                        print(run.output, flush=True)
                    survived.append(f"{number:3}  {fault.name}  ({fault.file})")
        finally:  # with Ctrl-C those under way end, and no others begin
            threads.shutdown(cancel_futures=True)
    if survived:
        sys.exit("\n".join(["", f"{len(survived)} of {len(faults)} faults are not caught:", *survived]))
    print(f"\nAll {len(faults)} faults are caught.")


if __name__ == "__main__":
    main()
