from __future__ import annotations

import socket
import time

import pytest

from pretrain.core.errors import ConfigError, PeerLostError, is_peer_loss
from pretrain.engine import rendezvous
from pretrain.engine.topology import free_port

TWO_HOSTS = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}


def test_ranks_of_one_host_and_a_choice_of_the_user_are_left_alone() -> None:
    one_host = TWO_HOSTS | {"LOCAL_WORLD_SIZE": "2"}
    assert rendezvous.choose_interface(one_host, has_gpus=True) == {}
    chosen = TWO_HOSTS | {"GLOO_SOCKET_IFNAME": "ib0"}
    assert rendezvous.choose_interface(chosen, has_gpus=True) == {}


def test_a_loopback_master_on_another_host_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"MASTER_ADDR \(localhost\) is a loopback address"):
        rendezvous.choose_interface(TWO_HOSTS | {"RANK": "1"}, has_gpus=False)


@pytest.mark.parametrize("has_gpus", [False, True])
def test_the_interface_is_that_towards_others(
    monkeypatch: pytest.MonkeyPatch, has_gpus: bool
) -> None:
    monkeypatch.setattr(rendezvous, "outward_address", lambda: "10.1.2.3")
    monkeypatch.setattr(rendezvous, "interface_of", {"10.1.2.3": "eth7"}.get)
    chosen = rendezvous.choose_interface(TWO_HOSTS, has_gpus)
    assert chosen["GLOO_SOCKET_IFNAME"] == "eth7"
    assert ("NCCL_SOCKET_IFNAME" in chosen) == has_gpus


def test_an_interface_that_cannot_be_found_names_the_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rendezvous, "outward_address", lambda: None)
    with pytest.raises(ConfigError, match="set GLOO_SOCKET_IFNAME"):
        rendezvous.choose_interface(TWO_HOSTS, has_gpus=False)


def test_a_host_that_does_not_reply_is_lost_soon() -> None:
    began = time.monotonic()
    with pytest.raises(PeerLostError, match="cannot be reached for 1 s"):
        rendezvous.wait_for_host("no-such-host.invalid", 29500, 1.0)
    assert time.monotonic() - began < 10


def test_a_host_that_has_not_started_its_rank_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    listener = socket.socket()
    began = time.monotonic()

    def start_late(seconds: float) -> None:
        # Refused for longer than the limit for a host that does not reply.
        if time.monotonic() - began > 1.5 and listener.getsockname()[1] == 0:
            listener.bind(("127.0.0.1", port))
            listener.listen()
        sleep(min(seconds, 0.1))

    sleep = time.sleep
    monkeypatch.setattr(rendezvous.time, "sleep", start_late)
    with listener:
        rendezvous.wait_for_host("127.0.0.1", port, 0.5)
    assert time.monotonic() - began > 1.5
    assert f"waiting for rank 0 on 127.0.0.1, port {port}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        # As torch 2.13 with gloo reported them: of a killed rank, a slow one, a cut cable, a card
        # that was taken out.
        "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed "
        "by peer [10.77.0.2]:4711. This is typically caused by a remote worker hanging",
        "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out "
        "waiting 2000ms for recv operation to complete",
        "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error "
        "[10.77.0.1]:9624: Connection timed out. This is typically caused by a remote worker",
        "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error "
        "[10.77.0.1]:29087: Network is unreachable. This is typically caused by a remote worker",
        # Further errors of sockets, which other kernels and libraries report.
        "Read error [10.77.0.2]:4711: No route to host",
        "connect [10.77.0.2]:4711: Connection refused",
        "Read error [10.77.0.2]:4711: Connection reset by peer",
        "Gloo connectFullMesh failed with [10.77.0.2]:4711",
    ],
)
def test_texts_of_the_network_are_a_lost_peer(text: str) -> None:
    assert is_peer_loss(RuntimeError(text))
    assert not is_peer_loss(ValueError(text))


def test_torchs_own_error_of_an_unreachable_store_is_a_lost_peer() -> None:
    from datetime import timedelta

    from torch.distributed import TCPStore

    with pytest.raises(RuntimeError) as raised:
        TCPStore("127.0.0.1", free_port(), is_master=False, timeout=timedelta(seconds=1))
    assert is_peer_loss(raised.value)
    assert not is_peer_loss(RuntimeError("shape mismatch"))
