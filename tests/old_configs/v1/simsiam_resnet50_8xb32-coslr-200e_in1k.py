_base_ = ['_base_/views.py', '_base_/sgd_200e.py', '_base_/runtime.py']

lr = 0.05
model = dict(
    type='SimSiam',
    data_preprocessor=_base_.data_preprocessor,
    backbone=dict(
        type='ResNet', depth=50, in_channels=3, out_indices=[4], norm_cfg=dict(type='SyncBN'), zero_init_residual=True),
    neck=dict(
        type='NonLinearNeck', in_channels=2048, hid_channels=2048, out_channels=2048, num_layers=3,
        with_last_bn_affine=False, with_avg_pool=True),
    head=dict(
        type='LatentPredictHead',
        loss=dict(type='CosineSimilarityLoss'),
        predictor=dict(
            type='NonLinearNeck', in_channels=2048, hid_channels=512, out_channels=2048, with_avg_pool=False,
            with_last_bn=False, with_last_bias=True)))
custom_hooks = [dict(type='SimSiamHook', priority='HIGH', fix_pred_lr=True, lr=lr)]
optim_wrapper = dict(optimizer=dict(lr=lr), paramwise_cfg=dict(custom_keys={'predictor': dict(fix_lr=True)}))
default_hooks = dict(checkpoint=dict(max_keep_ckpts=3))
