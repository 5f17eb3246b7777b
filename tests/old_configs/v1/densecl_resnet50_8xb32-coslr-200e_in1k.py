_base_ = 'mocov2_resnet50_8xb32-coslr-200e_in1k.py'

model = dict(
    type='DenseCL',
    loss_lambda=0.5,
    neck=dict(_delete_=True, type='DenseCLNeck', in_channels=2048, hid_channels=2048, out_channels=128, num_grid=None))
