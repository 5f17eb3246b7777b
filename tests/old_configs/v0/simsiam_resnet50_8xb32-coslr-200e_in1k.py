_base_ = ['_base_/mocov2_views.py', '_base_/sgd_200e.py', '_base_/runtime.py']

lr = 0.05
model = dict(
    type='SimSiam',
    backbone=dict(
        type='ResNet', depth=50, in_channels=3, out_indices=[4], norm_cfg=dict(type='SyncBN'), zero_init_residual=True),
    neck=dict(
        type='NonLinearNeck', in_channels=2048, hid_channels=2048, out_channels=2048, num_layers=3,
        with_last_bn_affine=False, with_avg_pool=True),
    head=dict(
        type='LatentPredictHead',
        predictor=dict(
            type='NonLinearNeck', in_channels=2048, hid_channels=512, out_channels=2048, with_avg_pool=False,
            with_last_bn=False, with_last_bias=True)))
custom_hooks = [dict(type='SimSiamHook', priority='HIGH', fix_pred_lr=True, lr=lr)]
optimizer = dict(lr=lr, paramwise_options={'predictor': dict(fix_lr=True)})
checkpoint_config = dict(interval=10, max_keep_ckpts=3)
