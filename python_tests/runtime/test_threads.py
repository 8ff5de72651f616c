"""Work on one thread puts the threads back, whatever happens in it."""

import pytest
import torch

from darkmatter_ext.runtime.threads import one_thread


def test_threads_come_back_after_work_and_after_an_error(two_threads):
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(KeyError), one_thread():
        raise KeyError
    assert torch.get_num_threads() == 2
