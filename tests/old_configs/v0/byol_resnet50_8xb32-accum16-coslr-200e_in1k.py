_base_ = ['_base_/byol_views.py', '_base_/lars_200e.py', '_base_/runtime.py']

update_interval = 16  # 8 * 32 * 16 = 4096
projector = dict(
    type='NonLinearNeck', hid_channels=4096, out_channels=256, num_layers=2, with_bias=True, with_last_bn=False)
model = dict(
    type='BYOL',
    base_momentum=0.99,
    backbone=dict(type='ResNet', depth=50, in_channels=3, out_indices=[4], norm_cfg=dict(type='SyncBN')),
    neck=dict(in_channels=2048, with_avg_pool=True, **projector),
    head=dict(type='LatentPredictHead', predictor=dict(in_channels=256, with_avg_pool=False, **projector)))
custom_hooks = [dict(type='MomentumUpdateHook', end_momentum=1., update_interval=update_interval)]
optimizer_config = dict(update_interval=update_interval)
norms_and_biases = dict(weight_decay=0., lars_exclude=True)
optimizer = dict(
    paramwise_options={'(bn|gn)(\\d+)?.(weight|bias)': norms_and_biases, 'bias': norms_and_biases,
                       'downsample.1': norms_and_biases})
checkpoint_config = dict(interval=10, max_keep_ckpts=3)
